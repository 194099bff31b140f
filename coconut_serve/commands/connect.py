"""Where the commands find a server: at a URL, or a child process that serves a model meanwhile."""

import contextlib
import os
from collections.abc import Sequence

from coconut_serve.errors import StartupError
from coconut_serve.evaluation.local import serving


def is_url(target: str) -> bool:
    """Whether it is a server's address and not a model."""
    return target.startswith(("http://", "https://"))


def base_url(
    target: str, flags: Sequence[str], *, is_interactive: bool = False
) -> contextlib.AbstractContextManager[str]:
    """Yield a server's address for OpenAI's clients, with /v1.

    Args:
        target: A URL, or a model, which is served until the context ends.
        flags: Of serve, for a model.
        is_interactive: Ctrl+C is not for the server.

    Raises:
        StartupError: There are flags for a URL, or the model could not be served.
    """
    if not is_url(target):
        return serving(target, tuple(flags), has_own_group=is_interactive)
    if flags:
        raise StartupError(f"{flags[0]} after -- needs a model, not a URL", param="--")
    return contextlib.nullcontext(target.rstrip("/").removesuffix("/v1") + "/v1")


def first_key() -> str:
    """Return the first key of COCONUT_API_KEY; empty if there is none."""
    return os.environ.get("COCONUT_API_KEY", "").partition(",")[0].strip()


def api_key(given: str | None) -> str:
    """Return the key that OpenAI's clients send: the one given, else the first of ours."""
    return given or first_key() or "-"
