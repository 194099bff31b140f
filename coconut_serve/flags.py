"""The flags of `coconut-serve serve`: names, defaults and what each says of itself."""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any, get_args

from coconut_serve.config import Device, DType, EngineName, LogFormat, ReasoningField
from coconut_serve.errors import StartupError
from coconut_serve.metrics import BUCKETS, parse_buckets
from coconut_serve.params import TraceLevel
from coconut_serve.reasoning.registry import mode_names

_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s*]+")


def _host(text: str) -> str:
    """Read a host, of which URLs write some in brackets."""
    return text.removeprefix("[").removesuffix("]")


def _origins(text: str) -> list[str]:
    """Read origins: one, several with commas, or a JSON list, as vLLM's flag.

    Raises:
        StartupError: One is no origin, so no browser would ever send it.
    """
    try:
        origins = json.loads(text) if text.startswith("[") else text.split(",")
    except ValueError:
        origins = [text]
    flag = "--allowed-origins"
    for origin in origins:
        if not isinstance(origin, str) or not _ORIGIN.fullmatch(origin.strip()):
            told = f"{flag}: {origin!r} is not an origin such as https://chat.example.com, or *"
            raise StartupError(told, param=flag)
    return [origin.strip() for origin in origins]


class _Group:
    """Flags under a title of their own."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def add(self, flag: str, default: object, text: str, kind: Any = str, **options: Any) -> None:
        """Declare a flag; `kind` bool is a switch."""
        if kind is bool:
            options["action"] = "store_true"
        else:
            metavar = {int: "N", float: "X"}.get(kind, "VALUE")
            options = {"type": kind, "metavar": metavar, **options}
        if options.get("choices"):
            del options["metavar"]
        self._group.add_argument(f"--{flag}", default=default, help=text, **options)

    def choose(self, flag: str, default: object, text: str, choices: Sequence[str]) -> None:
        """Declare a flag that takes one of some words."""
        self.add(flag, default, text, choices=choices)


# fmt: off
def add_serve_flags(serve: argparse.ArgumentParser) -> None:
    """Declare the flags of `serve`, grouped; a default of None is told in the text."""
    model = _Group(serve, "Model")
    model.add("served-model-name", None, "name clients use; default: MODEL, a directory's last part")
    model.choose("generation-config", "auto", "auto: the model's sampling defaults", ("auto", "none"))
    model.choose("dtype", "auto", "of weights and cache", get_args(DType))
    model.add("max-model-len", None, "positions a sequence may have; default: the model's", int)

    engine = _Group(serve, "Engine")
    engine.choose("engine", "native", "what runs the model", get_args(EngineName))
    engine.choose("device", "auto", "where to run", get_args(Device))
    engine.add("kv-cache-memory", "auto", "size of the KV cache: bytes, 2GiB, 40%% of free memory, or auto: on CPU what --max-num-seqs sequences need, at most 2GiB")
    engine.add("block-size", None, "positions of a KV block; default: 16, or what vLLM picks", int)
    engine.add("max-num-batched-tokens", None, "positions a step computes at most; default: 512 on CPU, 2048 on CUDA, what vLLM picks there", int)
    engine.add("no-prefix-caching", False, "recompute prompts that were seen before", bool)

    reasoning = _Group(serve, "Reasoning")
    reasoning.choose("default-reasoning-mode", None, "mode of requests that name none; default: the model's", mode_names())
    reasoning.add("allowed-reasoning-modes", None, "comma-separated; default: all the model supports")
    reasoning.choose("max-trace", "topk", "most detailed trace; vectors adds replay", get_args(TraceLevel))
    reasoning.choose("min-trace", "none", "least reasoning.trace of each answer", get_args(TraceLevel))
    reasoning.choose("reasoning-field", "both", "name of thinking text in answers", get_args(ReasoningField))
    reasoning.add("strict-params", False, "answer 400 to unknown request fields", bool)

    http = _Group(serve, "HTTP")
    http.add("host", "127.0.0.1", "address to listen on; :: is all, IPv4 too", _host)
    http.add("port", 8000, "port to listen on; 0 picks a free one", int)
    http.add("uds", None, "unix socket to listen on instead of host and port", metavar="FILE")
    http.add("root-path", "", "path that a proxy in front puts before ours, such as /llm")
    http.add("allowed-origins", [], 'web pages that may ask (CORS): "*", or a list or JSON list of origins; may be repeated', _origins, action="extend")
    http.add("ssl-certfile", None, "certificate of the server: HTTPS", metavar="FILE")
    http.add("ssl-keyfile", None, "its key; default: in the file of the certificate", metavar="FILE")
    http.add("ssl-ca-certs", None, "authorities of clients' certificates", metavar="FILE")
    http.add("ssl-cert-reqs", 0, "clients' certificates: 0 not asked for, 1 optional, 2 required", int, choices=(0, 1, 2))
    http.add("api-key", [], "key that clients must send; may be repeated", action="append")

    limits = _Group(serve, "Limits")
    limits.add("max-num-seqs", 64, "sequences that run at once", int)
    limits.add("max-queue", 256, "sequences that may wait; more are answered 429", int)
    limits.add("max-n", 8, "choices a request may ask for", int)
    limits.add("drain-seconds", 30.0, "how long SIGTERM waits for running requests", float)

    watch = _Group(serve, "Metrics and logs")
    watch.add("metrics-port", None, "also serve /metrics on this port, without a key; 0 picks one", int)
    watch.choose("log-format", "text", "of the log: lines of text or of JSON", get_args(LogFormat))
    watch.add("otlp-traces-endpoint", None, "send a span a request to this address (OTLP over HTTP)")
    watch.add("vllm-metric-aliases", False, "show metrics under vLLM's names too", bool)
    about = 'bounds of histograms, such as {"latent_steps": [1, 10]}; families: '
    watch.add("custom-histogram-buckets", {}, about + ", ".join(BUCKETS), parse_buckets, metavar="JSON")

    stub = _Group(serve, "Stub engine")
    stub.add("stub-ttft-seconds", 0.0, "time to first token", float)
    stub.add("stub-tokens-per-second", 0.0, "speed; 0 = at once", float)
    stub.add("stub-fail-after-requests", None, "die at the request after these", int)
    stub.add("stub-fail-at-token", None, "fail each request at this position", int)
# fmt: on
