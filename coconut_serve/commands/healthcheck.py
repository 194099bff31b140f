"""`coconut-serve healthcheck`: probe a server, or ask it a question in each mode.

Standard library only, so that a container's HEALTHCHECK costs little.
"""

import argparse
import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from typing import Any

from coconut_serve.arguments import Parser
from coconut_serve.server.listen import url_of

_QUESTION = "What is 2+2?"


class CheckError(Exception):
    """A failed check; the message is one line."""


def add_parser(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("healthcheck", help="probe a running server; status 0 or 1")
    parser.add_argument("url", nargs="?", metavar="URL", help="default: http://127.0.0.1:8000")
    parser.add_argument("--ready", action="store_true", help="ask whether it takes work")
    parser.add_argument("--ask", action="store_true", help="ask a question in each of its modes")
    parser.add_argument(
        "--timeout", type=float, default=5.0, metavar="X", help="seconds (--ask: 20x)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the checks and return the exit status."""
    url = args.url or _default_url()
    server = _Server(url, timeout_seconds=args.timeout, is_own=args.url is None)
    try:
        server.get("/ready" if args.ready or args.ask else "/health")
        for line in _ask_all(server) if args.ask else ["ok"]:
            print(line, flush=True)
    except CheckError as error:
        print(f"coconut-serve healthcheck: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str]) -> int:
    """Run the command alone, without importing what the server needs."""
    parser = Parser(prog="coconut-serve")
    add_parser(parser.add_subparsers(dest="command"))
    return run(parser.parse_args(argv))


def _default_url() -> str:
    """Build the URL of this machine's server from its environment variables."""
    port = os.environ.get("COCONUT_PORT", "8000")
    host = os.environ.get("COCONUT_HOST", "").strip("[]")
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    scheme = "https" if os.environ.get("COCONUT_SSL_CERTFILE") else "http"
    # Kubernetes sets a COCONUT_PORT too: tcp://...
    return url_of(host, int(port) if port.isdigit() else 8000, scheme=scheme)


class _Server:
    """Sends requests to one server, with the first key of COCONUT_API_KEY."""

    def __init__(self, url: str, *, timeout_seconds: float, is_own: bool) -> None:
        # The certificate names the public host, not the loopback address.
        self._context = ssl._create_unverified_context() if is_own else None
        self._url = url.rstrip("/").removesuffix("/v1")
        self._timeout_seconds = timeout_seconds
        self.key = os.environ.get("COCONUT_API_KEY", "").partition(",")[0]

    def get(self, path: str) -> Any:
        """Send a GET; returns the JSON of the response, None without a body."""
        return self._send(urllib.request.Request(self._url + path), self._timeout_seconds)

    def post(self, path: str, body: dict[str, Any], *, with_key: bool = True) -> Any:
        """Send a POST with a JSON body; returns the JSON of the response."""
        request = urllib.request.Request(self._url + path, data=json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        return self._send(request, self._timeout_seconds * 20, with_key=with_key)

    def _send(
        self, request: urllib.request.Request, timeout: float, *, with_key: bool = True
    ) -> Any:
        if not request.full_url.startswith(("http://", "https://")):
            raise CheckError(f"{request.full_url}: not an http address")
        if self.key and with_key:
            request.add_header("Authorization", f"Bearer {self.key}")
        try:
            with urllib.request.urlopen(
                request, timeout=timeout, context=self._context
            ) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            told = error.read(500).decode(errors="replace")
            raise CheckError(f"{request.full_url}: {error.code} {told}") from error
        except (OSError, ValueError) as error:
            raise CheckError(f"{request.full_url}: {error}") from error
        return json.loads(text) if text else None


def _ask_all(server: _Server) -> list[str]:
    """Ask in each mode, and without the key if there is one; returns a line per answer."""
    model = server.get("/v1/models")["data"][0]
    prompt = (model.get("manifest") or {}).get("prompt") or {}
    lines = [_ask(server, mode, prompt) for mode in model["reasoning_modes"]]
    if server.key:
        try:
            server.post("/v1/completions", {"prompt": [1]}, with_key=False)
        except CheckError as error:
            if ": 401 " not in str(error):
                raise
        else:
            raise CheckError("the server answers without a key")
        lines.append("without a key: 401")
    return lines


def _ask(server: _Server, mode: str, prompt: dict[str, Any]) -> str:
    """Ask the manifest's example, if it has one, and check for the answer it expects."""
    body: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "reasoning_mode": mode}
    expected = prompt.get("example_answer") or ""
    try:
        text = [{"role": "user", "content": prompt.get("example") or _QUESTION}]
        answer = server.post("/v1/chat/completions", {**body, "messages": text})
        message = answer["choices"][0]["message"]
        # A model without think tokens may give a whole short answer while it thinks.
        shown = message["content"] or message.get("reasoning_content") or message.get("reasoning")
        if not (shown or "").strip():
            raise CheckError(f"{mode}: the answer is empty, with usage {answer['usage']}")
        if expected.casefold() not in shown.casefold():
            raise CheckError(f"{mode}: {expected!r} is not in the answer {shown!r}")
    except CheckError as error:
        if not any(code in str(error) for code in ("no_tokenizer", "no_chat_template")):
            raise
        answer = server.post("/v1/completions", {**body, "prompt": [1, 2, 3]})
        shown = answer["choices"][0]["text"]
    used = answer["usage"]["reasoning"]["mode"]
    if used != mode or not answer["usage"]["completion_tokens"]:
        raise CheckError(f"asked for {mode}, got {used} with usage {answer['usage']}")
    return f"{mode}: {shown!r}"
