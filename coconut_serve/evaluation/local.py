"""A server of our own on this machine, for as long as a command needs one."""

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
def serving(model: str, flags: tuple[str, ...]) -> Iterator[str]:
    """Serve a model in a process of its own; yields the address of its API.

    Args:
        model: What `coconut-serve serve` takes.
        flags: More of its flags.

    Raises:
        StartupError: It did not start; the reason is on its standard error, which is ours.
    """
    command = [sys.executable, "-m", "coconut_serve", "serve", model, "--port", "0", *flags]
    # A line of its log for each request would run over the progress bar.
    quiet = {"COCONUT_LOG_LEVEL": "WARNING", **os.environ}
    for name in _ELSEWHERE:  # it is asked over plain HTTP on this machine, whatever is served here
        quiet.pop(f"COCONUT_{name.upper()}", None)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as process:
        try:
            assert process.stdout is not None
            found = next((m for line in process.stdout if (m := _ADDRESS.search(line))), None)
            if found is None:
                raise StartupError(f"{model} could not be served", param="MODEL")
            yield found[1]
        finally:
            process.terminate()
