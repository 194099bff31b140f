"""The flags of `coconut-serve serve`: names, defaults and what each says of itself."""

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from coconut_serve.config import Device, DType, EngineName, LogFormat, ReasoningField
from coconut_serve.metrics import BUCKETS, parse_buckets
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.types import TraceLevel


def add_serve_flags(serve: argparse.ArgumentParser) -> None:
    """Declare the flags of `serve`."""

    def add(flag: str, default: object, text: str, kind: Any = str, **options: Any) -> None:
        if kind is bool:
            options["action"] = "store_true"
        else:
            metavar = {int: "N", float: "X"}.get(kind, "VALUE")
            options = {"type": kind, "metavar": metavar, **options}
        if options.get("choices"):
            del options["metavar"]
        serve.add_argument(f"--{flag}", default=default, help=text, **options)

    def choose(flag: str, default: object, text: str, choices: Sequence[str]) -> None:
        add(flag, default, text, choices=choices)

    # fmt: off
    choose("engine", "native", "what runs the model", get_args(EngineName))
    add("host", "127.0.0.1", "address to listen on")
    add("port", 8000, "port to listen on; 0 picks a free one", int)
    add("metrics-port", None, "also serve /metrics on this port, without a key; 0 picks one", int)
    choose("log-format", "text", "of the log: lines of text or of JSON", get_args(LogFormat))
    add("otlp-traces-endpoint", None, "send a span a request to this address (OTLP over HTTP)")
    add("vllm-metric-aliases", False, "show metrics under vLLM's names too", bool)
    about = 'bounds of histograms, such as {"latent_steps": [1, 10]}; families: '
    add("custom-histogram-buckets", {}, about + ", ".join(BUCKETS), parse_buckets, metavar="JSON")
    add("served-model-name", None, "name clients use; default: MODEL, a directory's last part")
    add("api-key", [], "key that clients must send; may be repeated", action="append")
    choose("dtype", "auto", "of weights and cache", get_args(DType))
    choose("device", "auto", "where to run", get_args(Device))
    add("max-model-len", None, "positions a sequence may have; default: the model's", int)
    add("max-num-seqs", 64, "sequences that run at once", int)
    add("kv-cache-memory", "auto", "size of the KV cache: bytes, 2GiB, or 40%% of free memory")
    add("block-size", None, "positions of a KV block; default: 16, or what vLLM picks", int)
    add("max-num-batched-tokens", None, "positions a step computes at most", int)
    add("no-prefix-caching", False, "recompute prompts that were seen before", bool)
    add("max-queue", 256, "sequences that may wait; more are answered 429", int)
    add("max-n", 8, "choices a request may ask for", int)
    choose("default-reasoning-mode", None, "mode of requests that name none", mode_names())
    add("allowed-reasoning-modes", None, "comma-separated; default: all the model supports")
    choose("max-trace", "topk", "most detailed trace; vectors adds replay", get_args(TraceLevel))
    choose("min-trace", "none", "least reasoning.trace of each answer", get_args(TraceLevel))
    choose("reasoning-field", "both", "name of thinking text in answers", get_args(ReasoningField))
    add("strict-params", False, "answer 400 to unknown request fields", bool)
    add("drain-seconds", 30.0, "how long SIGTERM waits for running requests", float)
    add("stub-ttft-seconds", 0.0, "stub engine: time to first token", float)
    add("stub-tokens-per-second", 0.0, "stub engine: speed; 0 = at once", float)
    add("stub-fail-after-requests", None, "stub engine: die at the request after these", int)
    add("stub-fail-at-token", None, "stub engine: fail each request at this position", int)
    # fmt: on
