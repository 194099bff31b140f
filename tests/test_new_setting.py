"""A setting of a mode is a line of params.py and what the mode does with it; all else follows."""

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FIELD = """
    negate_by: float = setting(1.0, "negated: the factor of what is fed.", (0, 4), paper="9999.1")
"""
MODE = '''"""`negated`: think upside down."""

from typing import ClassVar

from coconut_serve.params import ReasoningParams
from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision


class NegatedMode(ReasoningMode):
    """Feed the hidden state upside down, `negate_by` times as long."""

    name: ClassVar[str] = "negated"

    @classmethod
    def needs_logits(cls, params: ReasoningParams) -> bool:
        """None are looked at."""
        return False

    def decide(self, ctx: StepContext) -> StepDecision:
        """Negate."""
        vector = -ctx.hidden * ctx.settings.negate_by.unsqueeze(1)
        return StepDecision(token=ctx.row_slots * 0 - 1, vector=vector)
'''
LINE = """
    "negated": ModeProperties(
        where=f"{_MODES_OF_PACKAGE}.negated:NegatedMode", settings=("negate_by",)
    ),
}
NO_THINKING ="""
# Run by a Python that imports the changed package.
CHECK = """
import asyncio
import sys
from pathlib import Path

import httpx
import torch

import coconut_serve
from coconut_serve.errors import InvalidRequestError
from coconut_serve.params import ReasoningParams
from tests import test_docs
from tests.fakes import listening, make_request, native_engine, run, stub_app
from tests.models import load_plain, reference

changed, llama = map(Path, sys.argv[1:])
assert Path(coconut_serve.__file__).is_relative_to(changed)


async def over_http() -> None:
    app = stub_app()
    bodies = app.openapi()["components"]["schemas"]
    field = bodies["ReasoningBody"]["properties"]["negate_by"]
    assert (field["minimum"], field["maximum"]) == (0, 4)
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:

        async def ask(mode: str, value: float) -> httpx.Response:
            own = {"steps": 2, "negate_by": value, "explain": True} if mode == "negated" else {
                "negate_by": value
            }
            body = {"messages": [{"role": "user", "content": "hello"}], "reasoning": own}
            body |= {"reasoning_mode": mode, "max_tokens": 2}
            return await client.post("/v1/chat/completions", json=body)

        told = (await ask("negated", 2.0)).json()["usage"]["reasoning"]
        assert told["resolved"]["negate_by"] == {"value": 2.0, "source": "request"}
        assert not told["warnings"]
        refused = await ask("negated", 5.0)
        assert refused.status_code == 400
        assert "reasoning.negate_by" in refused.text and "in 0..4" in refused.text
        unused = (await ask("cot", 2.0)).json()["usage"]["reasoning"]
        assert unused["warnings"] == ["without effect in mode cot: reasoning.negate_by"]


async def on_the_native_engine() -> None:
    prompt, own = (5, 6, 7, 8, 9), {"negate_by": 2.0}
    request = make_request(prompt=prompt, mode="negated", steps=3, end=(11,), reasoning=own)
    async with native_engine(llama) as engine:
        result = await run(engine, request)
    with torch.inference_mode():
        answer, _ = reference(
            load_plain(llama), list(prompt), 8, mode="latent", steps=3, end=(11,),
            adapter=lambda hidden: -2.0 * hidden,
        )
    assert result.token_ids == answer


asyncio.run(over_http())
asyncio.run(on_the_native_engine())
[row] = [row for row in test_docs.setting_rows() if "negate_by" in row]
assert row.startswith("| `negate_by` | 0..4 | 1.0 |") and "arXiv 9999.1" in row, row
try:
    ReasoningParams(mode="negated", negate_by=9.0)
except InvalidRequestError as error:
    assert error.param == "reasoning.negate_by"
else:
    raise AssertionError("out of range")
print("all of it")
"""


# The same where vLLM is installed: its workers get settings as flat keys.
CHECK_VLLM = """
from coconut_serve.engines.vllm.params import from_extra_args, to_extra_args, worker_params
from tests.fakes import make_request

own = {"negate_by": 2.0}
request = make_request(mode="negated", steps=3, end=(11,), reasoning=own)
flat = to_extra_args(worker_params(request, hidden_size=32, hidden_token_id=3))
assert flat["reasoning_negate_by"] == 2.0
read = from_extra_args(flat)
assert read is not None and read.params.negate_by == 2.0
print("all of it")
"""


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A folder with the package in which a mode and its setting are added."""
    package, copy = ROOT / "coconut_serve", tmp_path / "coconut_serve"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    edit(copy / "params.py", "    mixture: MixtureParams = internal(", FIELD[1:], before=True)
    edit(copy / "reasoning" / "registry.py", "}\nNO_THINKING =", LINE[1:])
    (copy / "reasoning" / "modes" / "negated.py").write_text(MODE, encoding="utf-8")
    assert differences(package, copy) == {
        "params.py", "reasoning/registry.py", "reasoning/modes/negated.py",
    }  # fmt: skip
    return tmp_path


def check(changed: Path, code: str, *args: Path) -> None:
    """Run code with the changed package."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(changed), *map(str, args)],
        env=os.environ | {"PYTHONPATH": f"{changed}{os.pathsep}{ROOT}"},
        cwd=changed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("all of it\n"), done.stderr


@pytest.mark.torch
def test_setting_of_a_mode_is_declared_once(tiny_llama: Path, changed: Path) -> None:
    """It was five product files, three documents and five tests."""
    check(changed, CHECK, tiny_llama)


@pytest.mark.vllm
def test_workers_of_vllm_get_it_too(changed: Path) -> None:
    check(changed, CHECK_VLLM)


def edit(file: Path, mark: str, text: str, *, before: bool = False) -> None:
    """Put a text in the place of a mark, or before it."""
    source = file.read_text(encoding="utf-8")
    assert source.count(mark) == 1
    file.write_text(source.replace(mark, text + mark if before else text), encoding="utf-8")


def differences(left: Path, right: Path) -> set[str]:
    """Python files that are not the same in both."""
    names = {p.relative_to(root).as_posix() for root in (left, right) for p in root.rglob("*.py")}
    _, unlike, missing = filecmp.cmpfiles(left, right, names, shallow=False)
    return {*unlike, *missing}
