"""Where the server listens: IPv6, a unix socket, HTTPS, behind a proxy's path."""

import asyncio
import contextlib
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coconut_serve import cli
from coconut_serve.commands import healthcheck
from coconut_serve.config import ServeConfig
from coconut_serve.errors import StartupError
from coconut_serve.server.draining import DrainingServer
from coconut_serve.server.listen import listen_for, url_of
from coconut_serve.server.metrics_port import add_metrics_port
from tests.fakes import stub_app

TLS = Path(__file__).with_name("tls")  # self-signed, for localhost, until 2126
CERT, KEY = str(TLS / "cert.pem"), str(TLS / "key.pem")


@contextlib.asynccontextmanager
async def serving(capsys: pytest.CaptureFixture[str], **config: Any) -> AsyncIterator[str]:
    """Run a stub server as `serve` does; yields the address that it prints."""
    settings = ServeConfig(served_model_name="m", port=0, **config)
    app = stub_app(**config)
    server = DrainingServer(settings, app)
    task = asyncio.create_task(server._serve(sockets=[listen_for(settings)]))
    try:
        async with asyncio.timeout(30):
            while not server.started or server.service is None:
                assert not task.done(), "the server ended before it was ready"
                await asyncio.sleep(0.01)
        listens, example = capsys.readouterr().out.splitlines()
        [address] = re.findall(r"https?://\S+(?=/v1)", listens)
        assert f"{address}/v1/" in example
        yield address
    finally:
        server.should_exit = True
        await task


def needs_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here: ::1 cannot be listened on")


def test_addresses_are_written_as_urls_write_them() -> None:
    """`--host ::1` was told as http://::1:8000, which no client can read."""
    assert url_of("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert url_of("::1", 8443, scheme="https") == "https://[::1]:8443"
    assert cli.parse_args(["serve", "--host", "[::1]"], {}).host == "::1"


async def test_ipv6_is_served_and_told_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    """`--host ::` took no IPv4."""
    needs_ipv6()
    async with serving(capsys, host="::") as url, httpx.AsyncClient() as client:
        assert re.fullmatch(r"http://\[::\]:\d+", url)
        for host in ("[::1]", "127.0.0.1"):
            address = url.replace("[::]", host)
            assert (await client.get(f"{address}/health")).status_code == 200
            assert await asyncio.to_thread(healthcheck.main, ["healthcheck", address]) == 0


async def test_metrics_port_tells_ipv6_in_brackets(caplog: pytest.LogCaptureFixture) -> None:
    needs_ipv6()
    caplog.set_level(logging.INFO)
    app = stub_app()
    add_metrics_port(app, host="::1", port=0)
    async with app.router.lifespan_context(app):
        assert re.search(r"metrics on http://\[::1\]:\d+/metrics", caplog.text)


def test_health_check_asks_where_the_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, url in (("::1", "http://[::1]:8000"), ("::", "http://127.0.0.1:8000")):
        monkeypatch.setenv("COCONUT_HOST", host)
        assert healthcheck._default_url() == url


async def test_unix_socket_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "coconut.sock")
    async with serving(capsys, uds=path) as url:
        transport = httpx.AsyncHTTPTransport(uds=path)
        async with httpx.AsyncClient(transport=transport, base_url=url) as client:
            body = {"prompt": "abc", "max_tokens": 2}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        with pytest.raises(StartupError, match=r"--uds .*in use"):
            listen_for(ServeConfig(served_model_name="m", uds=path))
    # Nobody answers any more: it is what a killed server leaves behind.
    listen_for(ServeConfig(served_model_name="m", uds=path)).close()
    (tmp_path / "file").write_text("not a socket")
    with pytest.raises(StartupError, match=r"--uds .*in use"):
        listen_for(ServeConfig(served_model_name="m", uds=str(tmp_path / "file")))


async def test_https_is_served_and_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(capsys, ssl_certfile=CERT, ssl_keyfile=KEY) as url:
        assert url.startswith("https://127.0.0.1:")
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=CERT)) as client:
            assert (await client.get(f"{url}/health")).status_code == 200
        monkeypatch.setenv("COCONUT_SSL_CERTFILE", CERT)
        monkeypatch.setenv("COCONUT_PORT", url.rpartition(":")[2])
        assert await asyncio.to_thread(healthcheck.main, ["healthcheck", "--ready"]) == 0


async def test_client_without_its_certificate_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    files: dict[str, Any] = {"ssl_certfile": CERT, "ssl_keyfile": KEY, "ssl_ca_certs": CERT}
    async with serving(capsys, **files, ssl_cert_reqs=2) as url:
        context = ssl.create_default_context(cafile=CERT)
        async with httpx.AsyncClient(verify=context) as client:
            with pytest.raises(httpx.TransportError):
                await client.get(f"{url}/health")
        context.load_cert_chain(CERT, KEY)
        async with httpx.AsyncClient(verify=context) as client:
            assert (await client.get(f"{url}/health")).status_code == 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ssl-certfile", "/no/file"], "--ssl-certfile /no/file: No such file"),
        (["--ssl-certfile", CERT], f"--ssl-certfile {CERT} has no key in PEM"),
        (
            ["--ssl-certfile", CERT, "--ssl-keyfile", CERT],
            f"--ssl-keyfile {CERT} has no key in PEM",
        ),
        (["--ssl-certfile", CERT, "--ssl-keyfile", "/no/key"], "--ssl-keyfile /no/key: No such"),
        (["--ssl-certfile", __file__], f"--ssl-certfile {__file__} has no certificate"),
        (["--ssl-keyfile", KEY], "--ssl-keyfile needs --ssl-certfile"),
        (
            ["--ssl-certfile", CERT, "--ssl-keyfile", KEY, "--ssl-ca-certs", __file__],
            f"--ssl-ca-certs {__file__} has no certificate",
        ),
        (
            ["--ssl-certfile", CERT, "--ssl-keyfile", KEY, "--ssl-cert-reqs", "2"],
            "--ssl-cert-reqs needs --ssl-ca-certs",
        ),
        (["--uds", "/no/dir/x"], "--uds /no/dir/x: No such file"),
        (["--root-path", "llm/"], "--root-path must begin with /"),
        (["--allowed-origins", "https://a.example/"], "--allowed-origins: 'https://a.example/' is"),
    ],
)
def test_wrong_address_or_certificate_is_one_line_and_a_status(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--engine", "stub", "--port", "0", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"coconut-serve: {message}")


async def test_root_path_of_a_proxy_changes_no_rule(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the proxy takes its path off or leaves it on."""
    config: dict[str, Any] = {"root_path": "/llm", "api_keys": ("secret",)}
    key = {"Authorization": "Bearer secret"}
    async with serving(capsys, **config) as url, httpx.AsyncClient(base_url=url) as client:
        for prefix in ("", "/llm"):
            assert (await client.get(f"{prefix}/health")).status_code == 200
            assert (await client.post(f"{prefix}/v1/completions", json={})).status_code == 401
            assert (await client.get(f"{prefix}/v1/models")).status_code == 401
            assert (await client.get(f"{prefix}/v1/models", headers=key)).status_code == 200
        page = (await client.get("/metrics", headers=key)).text
        spec = (await client.get("/llm/openapi.json", headers=key)).json()
    assert 'route="/v1/completions",status="401"} 2.0' in page
    assert spec["servers"] == [{"url": "/llm"}]
