"""Connections that simulated clients keep."""

import asyncio
import time

from coconut_serve.commands.measure import ask
from coconut_serve.config import StubConfig
from loadtests.scenarios.clients import PooledTarget
from tests.fakes import listening, stub_app


async def test_connection_is_used_again_once_its_answer_is_read() -> None:
    app = stub_app(stub=StubConfig(), max_num_seqs=1, max_queue=0)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    async with listening(app) as url:
        target = PooledTarget(url=url)
        seen = []
        for is_stream in (True, False, True):
            record = await asyncio.to_thread(ask, target, body | {"stream": is_stream})
            assert record.is_ok
            seen.append(target.idle[-1][1])
        places = app.state.service.admission.acquire(1, max_positions=8)
        assert (await asyncio.to_thread(ask, target, body)).status == 429
        app.state.service.admission.release(places)
        seen.append(target.idle[-1][1])
        assert len(target.idle) == 1
        assert all(each is seen[0] for each in seen)

        hung_up = await asyncio.to_thread(
            ask, target, body | {"stream": True}, on_chunk=lambda _: False
        )
        assert hung_up.error == "hung up"
        assert not target.idle, "what was left of its answer would come before the next"

        await asyncio.to_thread(ask, target, body)
        [(_, old)] = target.idle
        target.idle[:] = [(time.monotonic() - 3, old)]
        assert (await asyncio.to_thread(ask, target, body)).is_ok
        assert target.idle[0][1] is not old
        target.idle[0][1].close()
