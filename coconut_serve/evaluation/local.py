"""A temporary local server for a command."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator

from coconut_serve.errors import StartupError

_ADDRESS = re.compile(r"listens on (http://\S+)")
_ELSEWHERE = (
    "host",
    "root_path",
    "ssl_ca_certs",
    "ssl_cert_reqs",
    "ssl_certfile",
    "ssl_keyfile",
    "uds",
)


@contextlib.contextmanager
def serving(model: str, flags: tuple[str, ...], *, has_own_group: bool = False) -> Iterator[str]:
    """Serve a model in a child process; yields the URL of its API.

    Args:
        model: As for `coconut-serve serve`.
        flags: More flags of serve.
        has_own_group: Ctrl+C in the terminal does not reach it.

    Raises:
        StartupError: It did not start; it wrote the reason to the stderr it shares with us.
    """
    command = [sys.executable, "-m", "coconut_serve", "serve", model, "--port", "0", *flags]
    # Its log lines, one per request, would break the progress bar.
    quiet = {"COCONUT_LOG_LEVEL": "WARNING", **os.environ}
    for name in _ELSEWHERE:  # this command reaches it over plain HTTP on the loopback
        quiet.pop(f"COCONUT_{name.upper()}", None)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=quiet,
        process_group=0 if has_own_group else None,
    ) as process:
        try:
            assert process.stdout is not None
            found = next((m for line in process.stdout if (m := _ADDRESS.search(line))), None)
            if found is None:
                raise StartupError(f"{model} could not be served", param="MODEL")
            yield found[1]
        finally:
            process.terminate()
