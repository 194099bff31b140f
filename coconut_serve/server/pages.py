"""The playground at /playground: static pages that ask the API as any client does.

The pages need no key, what they ask of the API does. Everything comes from files of this package,
and their policy lets browsers load nothing else; model output is only ever set as text.
"""

import importlib.resources

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

_PAGES = {"/playground": "index.html", "/docs": "docs.html"}
_FILES = (
    "api.js", "column.js", "docs.js", "icon.svg", "playground.css", "playground.js", "request.js",
    "trace.js",
)  # fmt: skip
_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # no text becomes HTML or code, whoever wrote it
    "trusted-types": "'none'",
}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_SOURCES = {**_PAGES, **{f"/playground/{name}": name for name in _FILES}}  # path -> file
PATHS = frozenset({"/", *_SOURCES})


def make_router() -> APIRouter:
    """Read the files and make their routes; `/` leads to the playground."""
    router = APIRouter(include_in_schema=False)
    folder = importlib.resources.files("coconut_serve.server") / "ui"
    router.add_api_route("/", _lead, methods=["GET"])
    for path, name in _SOURCES.items():
        router.add_api_route(path, _Static((folder / name).read_bytes(), name), methods=["GET"])
    return router


async def _lead(request: Request) -> Response:
    # Relative where no prefix is known: a proxy may have one that it did not tell.
    root = request.scope.get("root_path", "")
    return RedirectResponse(f"{root}/playground" if root else "playground", headers=_HEADERS)


class _Static:
    """Answers with one file."""

    def __init__(self, content: bytes, name: str) -> None:
        self.__name__ = f"static_{name}"
        self._content = content
        self._media_type = _TYPES[name.rpartition(".")[2]]

    async def __call__(self) -> Response:
        return Response(self._content, media_type=self._media_type, headers=_HEADERS)
