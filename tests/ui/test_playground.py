"""The playground in headless Chromium: asking, stopping, keys, errors, phones, the dark."""

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import coconut_serve
from coconut_serve.config import StubConfig
from coconut_serve.service.tokenizer import ByteTokenizer
from tests.fakes import listening, native_app, stub_app

pytestmark = pytest.mark.browser

DEMO = Path(coconut_serve.__file__).parent / "models" / "demo"
QUESTION = (
    "lima > tokyo, delhi > paris, bern > dubai, dubai > lima, bern > doha, dubai > seoul, "
    "rabat > sydney, doha > bonn, tokyo > turin, sydney > delhi, delhi > rome, tunis > rabat, "
    "rabat > lagos, lagos > riga, rome or turin from bern?"
)
PHONE = {"width": 360, "height": 740}


async def opened(page: Any, url: str, path: str = "/") -> None:
    await page.goto(url + path)
    await page.wait_for_selector("#run:enabled")


async def asked(page: Any, question: str | None = None) -> None:
    """Run, and wait until every column has ended."""
    if question is not None:
        await page.fill("#question", question)
    await page.click("#run")
    await page.wait_for_selector("#results[aria-busy=false]")


async def states(page: Any) -> dict[str, str]:
    columns = await page.locator("article").all()
    return {
        await each.get_attribute("data-mode"): await each.get_attribute("data-state")
        for each in columns
    }


async def violations(page: Any) -> list[str]:
    """What axe finds, of WCAG 2.2 at level AA and its own good practice."""
    axe = pytest.importorskip("axe_playwright_python.async_playwright")
    found = await axe.Axe().run(page)
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found.response["violations"]]


@pytest.mark.torch
async def test_demo_answers_in_three_modes_and_shows_its_steps(page: Any) -> None:
    async with listening(native_app(DEMO)) as url:
        await opened(page, url)
        assert "turin" in await page.input_value("#question"), "the model's example"
        await asked(page, QUESTION)
        assert await states(page) == {"none": "done", "cot": "done", "latent": "done"}
        for mode in ("cot", "latent"):
            assert await page.inner_text(f"[data-mode={mode}] .answer .text") == "turin"
        assert "dubai lima" in await page.inner_text("[data-mode=cot] .thought .text")
        steps = page.locator("[data-mode=latent] .step")
        assert await steps.count() == 6
        for curve in ("entropy", "norm"):
            await page.wait_for_selector(f"[data-mode=latent] .curve.{curve}:visible")
        await steps.nth(1).focus()
        await page.keyboard.press("ArrowLeft")
        assert (await page.inner_text("[data-mode=latent] .facts")).startswith("Step 1")
        places = await page.locator("[data-mode=latent] .bars .token").all_inner_texts()
        assert {*places[:2]} == {"doha", "dubai"}, "the places one edge from the root"
        counts = await page.inner_text("[data-mode=latent] .counts")
        assert re.search(r"Forward passes\s+10\b", counts)
        assert re.search(r"Thinking ended by\s+fixed", counts)
        assert re.search(r"First token\s+[\d.]+ m?s", counts)
        assert not await violations(page)


@pytest.mark.torch
async def test_shown_code_asks_the_same(page: Any) -> None:
    async with listening(native_app(DEMO)) as url:
        await opened(page, url)
        await page.fill("#question", QUESTION)
        await page.click("#settings summary")
        await page.fill("#temperature", "0")
        await page.fill("#seed", "7")
        await page.click("#code > summary")
        await page.select_option("#code-mode", "latent")
        script = await page.inner_text("#python")
        command = await page.inner_text("#curl")
        assert "seed=7" in script
        assert '"seed":7' in command
        for words in ([sys.executable, "-c", script], ["sh", "-c", command]):
            process = await asyncio.create_subprocess_exec(
                *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            told, _ = await process.communicate()
            assert process.returncode == 0
            assert "turin" in told.decode()


async def test_stop_ends_all_streams_and_frees_their_places(page: Any) -> None:
    app = stub_app(stub=StubConfig(tokens_per_second=20))
    async with listening(app) as url:
        await opened(page, url)
        await page.fill("#question", "abc " * 40)
        await page.press("#question", "Control+Enter")
        await page.wait_for_selector("[data-state=answering]")
        assert app.state.service.admission.num_in_flight == 3
        await page.keyboard.press("Escape")
        await page.wait_for_selector("#results[aria-busy=false]")
        assert {*(await states(page)).values()} == {"stopped"}
        async with asyncio.timeout(10):
            while app.state.service.admission.num_in_flight:
                await asyncio.sleep(0.02)
        assert await page.is_enabled("#run")
        assert await page.is_disabled("#stop")


async def test_key_is_asked_for_and_kept_in_the_tab_alone(page: Any) -> None:
    async with listening(stub_app(api_keys=("secret",))) as url:
        await page.goto(url)
        await page.wait_for_selector("#key-form:visible")
        assert await page.is_disabled("#run")
        assert not await violations(page)
        await page.fill("#key", "wrong")
        await page.press("#key", "Enter")
        await page.wait_for_selector("text=The key given here is not accepted")
        await page.fill("#key", "secret")
        await page.press("#key", "Enter")
        await page.wait_for_selector("#run:enabled")
        await asked(page, "abc")
        assert {*(await states(page)).values()} == {"done"}
        await page.reload()
        await page.wait_for_selector("#run:enabled")
        assert await page.is_hidden("#key-form")
        assert "secret" not in page.url + await page.content()
        assert "$COCONUT_API_KEY" in (await page.text_content("#curl"))
        stored = await page.evaluate("[localStorage.length, document.cookie]")
        assert stored == [0, ""]


async def test_full_server_is_waited_for(page: Any) -> None:
    app = stub_app(max_num_seqs=3, max_queue=0)
    async with listening(app) as url:
        await opened(page, url)
        places = app.state.service.admission.acquire(3, max_positions=8)
        await page.fill("#question", "abc")
        await page.click("#run")
        await page.wait_for_selector(".column-note:has-text('Trying again in')")
        app.state.service.admission.release(places)
        await page.wait_for_selector("#results[aria-busy=false]")
        assert {*(await states(page)).values()} == {"done"}


async def test_loading_model_is_waited_for(page: Any) -> None:
    app = stub_app()
    async with listening(app) as url:
        service, app.state.service = app.state.service, None
        await page.goto(url)
        await page.wait_for_selector("#notice:has-text('The model is loading')")
        app.state.service = service
        await page.wait_for_selector("#run:enabled")
        assert await page.is_hidden("#notice")


async def test_refused_setting_is_named_and_marked(page: Any) -> None:
    async with listening(stub_app()) as url:
        await opened(page, url, "/playground#modes=latent&steps=99999")
        await asked(page, "abc")
        told = await page.inner_text("[role=alert].column-note")
        assert told.startswith("400: ")
        assert "(param: reasoning.steps)" in told
        assert await page.get_attribute("#steps", "aria-invalid") == "true"
        assert await states(page) == {"latent": "failed"}
        assert not await violations(page)


async def test_dead_engine_and_broken_stream_are_told(page: Any) -> None:
    app = stub_app(stub=StubConfig(fail_at_token=30))
    async with listening(app) as url:
        await opened(page, url, "/playground#modes=cot")
        await asked(page, "abc " * 20)
        assert await page.inner_text(".answer .text") != "", "what came stays"
        assert "scripted failure" in await page.inner_text(".column-note")
        assert await states(page) == {"cot": "failed"}
    async with listening(stub_app(stub=StubConfig(fail_after_requests=0))) as url:
        await opened(page, url, "/playground#modes=cot")
        await asked(page, "abc")
        assert await page.inner_text(".column-note") == "scripted failure"
        await asked(page)  # it stays dead, and nobody waits for it
        assert await states(page) == {"cot": "failed"}
        assert (await page.inner_text(".column-note")).startswith("503: ")


async def test_model_output_is_never_html(page: Any) -> None:
    mark = "<img src=x><b>bold</b><script>document.title='x'</script>"
    async with listening(stub_app()) as url:
        await opened(page, url)
        await asked(page, mark)
        assert "<b>bold" in await page.inner_text("[data-mode=none] .answer .text")
        assert await page.locator("#results :is(img, b, script)").count() == 0


async def test_link_brings_question_modes_and_settings(page: Any) -> None:
    async with listening(stub_app()) as url:
        await opened(page, url)
        await page.fill("#question", 'a & b = "c" #1')
        await page.uncheck("#modes input[value=none]")
        await page.check("#modes input[value=auto]")
        await page.click("#settings summary")
        await page.fill("#max_tokens", "5")
        await page.select_option("#preset", "moi")
        await page.focus("#skip")
        await page.keyboard.press("Enter")
        assert await page.evaluate("document.activeElement.id") == "results"
        link = page.url
        await page.goto("about:blank")
        await page.goto(link)
        await page.wait_for_selector("#run:enabled")
        await page.wait_for_selector("#preset option[value=moi]", state="attached")
        assert await page.input_value("#question") == 'a & b = "c" #1'
        assert await page.input_value("#max_tokens") == "5"
        assert await page.input_value("#preset") == "moi"
        boxes = await page.locator("#modes input:checked").all()
        assert [await box.get_attribute("value") for box in boxes] == ["cot", "latent", "auto"]
        assert await page.locator("article").count() == 0, "a link never asks by itself"


async def test_model_that_takes_no_chats_is_asked_for_completions(page: Any) -> None:
    class Plain(ByteTokenizer):
        has_chat_template = False

    async with listening(stub_app(tokenizer=Plain())) as url:
        await opened(page, url)
        await asked(page, "abc")
        assert {*(await states(page)).values()} == {"done"}
        assert "abc" in await page.inner_text("[data-mode=none] .answer .text")
        assert "/v1/completions" in await page.text_content("#curl")
        assert "client.completions.create" in await page.text_content("#python")


@pytest.mark.parametrize("level", ["none", "summary"])
async def test_server_that_gives_smaller_traces_is_asked_for_those(page: Any, level: str) -> None:
    async with listening(stub_app(max_trace=level)) as url:
        await opened(page, url)
        await asked(page, "abc")
        assert {*(await states(page)).values()} == {"done"}
        has_trace = await page.is_visible("[data-mode=latent] .trace")
        assert has_trace == (level == "summary")


async def test_pages_work_behind_a_path(page: Any) -> None:
    async with listening(stub_app(root_path="/llm")) as url:
        await opened(page, url, "/llm/")
        assert page.url.startswith(f"{url}/llm/playground")
        await asked(page, "abc")
        assert {*(await states(page)).values()} == {"done"}
        assert f"{url}/llm/v1/chat/completions" in await page.text_content("#curl")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}])
async def test_every_size_and_scheme_is_readable(
    page: Any, scheme: str, size: dict[str, int]
) -> None:
    async with listening(stub_app()) as url:
        await page.set_viewport_size(size)
        await page.emulate_media(color_scheme=scheme)
        await opened(page, url)
        assert not await violations(page)
        await page.click("#settings summary")
        await page.click("#code > summary")
        await asked(page, "a long question without spaces: " + "x" * 120)
        assert not await violations(page)
        width = await page.evaluate("document.documentElement.scrollWidth")
        assert width == size["width"], "nothing is wider than the window"
        page_colour = "getComputedStyle(document.body).backgroundColor"
        red = int(re.findall(r"\d+", await page.evaluate(page_colour))[0])
        assert (red < 64) == (scheme == "dark")


async def test_reference_shows_every_route_and_object(page: Any) -> None:
    app = stub_app()
    async with listening(app) as url:
        await page.goto(f"{url}/docs#HaltBody")
        await page.wait_for_selector("#HaltBody[open]")
        paths = await page.locator("#routes summary code").all_inner_texts()
        assert paths == [*app.openapi()["paths"]]
        names = await page.locator("#schemas summary code").all_inner_texts()
        assert names == [*app.openapi()["components"]["schemas"]]
        assert "entropy_below" in await page.inner_text("#HaltBody")
        assert not await violations(page)
