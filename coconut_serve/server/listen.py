"""Ports, taken before anything is loaded."""

import socket

from coconut_serve.errors import StartupError


def listen(host: str, port: int, flag: str) -> socket.socket:
    """Take a port.

    Raises:
        StartupError: It cannot be had; `flag` is what names it.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise StartupError(f"{flag} {port}: {error}", param=flag) from error
