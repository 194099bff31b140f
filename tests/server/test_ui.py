"""The pages: what serves them, what they may load, and how they find the API."""

import re
from pathlib import Path

import httpx
import pytest

import coconut_serve
from coconut_serve.cli import parse_args
from coconut_serve.config import Settings
from coconut_serve.loading import serve_config
from coconut_serve.server import pages
from tests.fakes import listening, stub_app

FOLDER = Path(coconut_serve.__file__).parent / "server" / "ui"
FILES = sorted(FOLDER.iterdir())
MAX_BYTES = 100_000  # of all pages together


def policy(answer: httpx.Response) -> dict[str, str]:
    parts = answer.headers["content-security-policy"].split("; ")
    return {name: values for name, _, values in (part.partition(" ") for part in parts)}


async def test_pages_come_with_a_policy_that_lets_nothing_else_in(http: httpx.AsyncClient) -> None:
    for path in sorted(pages.PATHS):
        answer = await http.get(path, follow_redirects=False)
        assert answer.status_code == (307 if path == "/" else 200), path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        allowed = policy(answer)
        assert allowed["default-src"] == allowed["frame-ancestors"] == "'none'"
        assert allowed["base-uri"] == allowed["form-action"] == allowed["trusted-types"] == "'none'"
        assert allowed["require-trusted-types-for"] == "'script'"
        for kind in ("script-src", "style-src", "img-src", "connect-src"):
            assert allowed[kind] == "'self'", kind


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/playground", "text/html; charset=utf-8"),
        ("/docs", "text/html; charset=utf-8"),
        ("/playground/playground.css", "text/css; charset=utf-8"),
        ("/playground/playground.js", "text/javascript; charset=utf-8"),
        ("/playground/icon.svg", "image/svg+xml"),
    ],
)
async def test_files_have_the_types_that_nosniff_needs(
    http: httpx.AsyncClient, path: str, kind: str
) -> None:
    answer = await http.get(path)
    assert answer.headers["content-type"] == kind
    assert (await http.head(path)).headers["content-type"] == kind
    assert (await http.post(path)).status_code == 405


async def test_root_leads_to_the_playground(http: httpx.AsyncClient) -> None:
    answer = await http.get("/", follow_redirects=True)
    assert answer.url.path == "/playground"
    assert "<title>coconut-serve playground</title>" in answer.text


def test_every_file_is_served_and_all_are_small() -> None:
    served = {*pages._SOURCES.values()}
    assert {file.name for file in FILES} == served
    assert sum(file.stat().st_size for file in FILES) < MAX_BYTES


def test_files_name_nothing_of_elsewhere_and_make_no_html_of_text() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]", text), file.name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text
        ), file.name
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script>", text), file.name


def test_links_are_relative_so_that_a_proxy_may_add_a_path() -> None:
    for name in ("index.html", "docs.html"):
        text = (FOLDER / name).read_text(encoding="utf-8")
        links = re.findall(r'(?:href|src)="([^"]*)"', text)
        assert links
        assert not [link for link in links if link.startswith("/")]
    for file in FOLDER.glob("*.js"):
        paths = re.findall(r'["\'`](/[a-z][^"\'`]*)["\'`]', file.read_text(encoding="utf-8"))
        assert not paths, file.name


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_pages_work_behind_a_path_that_the_proxy_keeps_or_strips(prefix: str) -> None:
    async with listening(stub_app(root_path="/llm")) as url, httpx.AsyncClient() as client:
        answer = await client.get(f"{url}{prefix}/")
        assert answer.headers["location"] == "/llm/playground"
        for path in ("/playground", "/playground/api.js", "/docs"):
            assert (await client.get(f"{url}{prefix}{path}")).status_code == 200


async def test_root_of_an_untold_proxy_leads_on_by_a_relative_link(http: httpx.AsyncClient) -> None:
    assert (await http.get("/")).headers["location"] == "playground"


async def test_pages_need_no_key_but_what_they_ask_does() -> None:
    async with listening(stub_app(api_keys=("secret",))) as url, httpx.AsyncClient() as client:
        for path in sorted(pages.PATHS):
            assert (await client.get(f"{url}{path}")).status_code in (200, 307), path
        for path in ("/v1/models", "/openapi.json", "/playground/other", "/docs/other"):
            assert (await client.get(f"{url}{path}")).status_code == 401, path


@pytest.mark.parametrize("keys", [(), ("secret",)])
async def test_disable_ui_serves_no_page(keys: tuple[str, ...]) -> None:
    app = stub_app(disable_ui=True, api_keys=keys)
    headers = {"Authorization": "Bearer secret"}
    async with listening(app) as url, httpx.AsyncClient(headers=headers) as client:
        for path in sorted(pages.PATHS):
            assert (await client.get(f"{url}{path}")).status_code == 404, path
        assert (await client.get(f"{url}/v1/models")).status_code == 200


def test_disable_ui_is_a_flag() -> None:
    args = parse_args(["serve", "--disable-ui"], {})
    assert serve_config(Settings.model_validate(args)).disable_ui
    assert parse_args(["serve"], {"COCONUT_DISABLE_UI": "true"}).disable_ui


async def test_pages_are_there_while_the_model_loads() -> None:
    app = stub_app()
    transport = httpx.ASGITransport(app=app)  # its lifespan, which loads, does not run
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/playground")).status_code == 200
        assert (await client.get("/v1/models")).headers["retry-after"]


async def test_pages_are_few_series_and_no_part_of_the_reference() -> None:
    """What is no page must not become a label of its own."""
    app = stub_app()
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:
        for path in ("/", "/playground", "/playground/nothing", "/playground/../x", "/docsx"):
            await client.get(path)
        shown = (await client.get("/metrics")).text
    routes = set(re.findall(r'coconut_http_requests_total\{.*route="([^"]*)"', shown))
    assert routes <= {"/", "/playground", "other", "/metrics"}
    assert not pages.PATHS & {*app.openapi()["paths"]}
