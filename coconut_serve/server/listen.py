"""Binds ports and sockets and checks certificates, before anything is loaded."""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from coconut_serve.errors import StartupError

if TYPE_CHECKING:  # healthcheck, which starts every few seconds, loads no pydantic
    from coconut_serve.config import ServeConfig


def url_of(host: str, port: int, *, scheme: str = "http") -> str:
    """A server's URL; IPv6 addresses are in brackets."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def api_url(config: "ServeConfig", listener: socket.socket) -> str:
    """The address of the API for clients."""
    scheme = "https" if config.ssl_certfile else "http"
    if config.uds is not None:
        return f"{scheme}://localhost/v1 (unix socket {config.uds})"
    return f"{url_of(config.host, listener.getsockname()[1], scheme=scheme)}/v1"


def listen(host: str, port: int, flag: str) -> socket.socket:
    """Bind a port; "::" serves IPv4 too, where the system can.

    Raises:
        StartupError: It is not available; `flag` names it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    is_any = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=is_any)
    except OSError as error:
        raise StartupError(f"{flag} {port}: {error}", param=flag) from error


def listen_for(config: "ServeConfig") -> socket.socket:
    """Bind the port or unix socket that clients connect to.

    Raises:
        StartupError: It is not available, or the certificate cannot be used.
    """
    _check_tls(config)
    if config.uds is None:
        return listen(config.host, config.port, "--port")
    path = Path(config.uds)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            _remove_stale(path)
        listener.bind(config.uds)
        listener.listen()
    except OSError as error:
        listener.close()
        raise StartupError(f"--uds {path}: {error.strerror or error}", param="--uds") from error
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a killed server, but not that of a live one."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
        probe.connect(str(path))
        return
    path.unlink()


def _check_tls(config: "ServeConfig") -> None:
    if config.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificates = {"--ssl-certfile": config.ssl_certfile, "--ssl-ca-certs": config.ssl_ca_certs}
    for flag, path in certificates.items():
        if path is not None:
            with _naming(flag, path, "has no certificate in PEM"):
                context.load_verify_locations(path)
    key = config.ssl_keyfile or config.ssl_certfile
    flag = "--ssl-keyfile" if config.ssl_keyfile else "--ssl-certfile"
    with _naming(flag, key, "has no key in PEM, an encrypted one or that of another certificate"):
        # An encrypted key would ask for its password.
        context.load_cert_chain(config.ssl_certfile, key, password="")


@contextlib.contextmanager
def _naming(flag: str, path: str, reason: str) -> Iterator[None]:
    """Turn errors into ours, since those of ssl name no file."""
    try:
        Path(path).read_bytes()
        yield
    except ssl.SSLError as error:
        raise StartupError(f"{flag} {path} {reason}", param=flag) from error
    except OSError as error:
        raise StartupError(f"{flag} {path}: {error.strerror}", param=flag) from error
