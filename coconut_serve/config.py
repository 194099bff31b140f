"""The settings of `serve`, each declared once: a field with its flag, type, default and range.

`--help`, the words of files and of the environment, and the chart's schema are read off `Settings`.
Flags win over the environment (COCONUT_*), that over the file, that over the defaults.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from coconut_serve.arguments import option
from coconut_serve.buckets import BUCKETS, parse_buckets
from coconut_serve.errors import StartupError
from coconut_serve.params import TraceLevel
from coconut_serve.reasoning.registry import mode_names

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
EngineName = Literal["native", "vllm", "stub"]
LogFormat = Literal["text", "json"]
ReasoningField = Literal["both", "reasoning", "reasoning_content"]
Group = Literal["Model", "Engine", "Reasoning", "HTTP", "Limits", "Metrics and logs", "Stub engine"]

_Part = TypeVar("_Part", bound="Record")
_FILE = {"metavar": "FILE"}  # what shells complete
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s*]+")


def _require(condition: bool, flag: str, message: str) -> None:
    if not condition:
        raise StartupError(f"{flag} {message}", param=flag)


def _host(text: str) -> str:
    """Read a host, of which URLs write some in brackets."""
    return text.removeprefix("[").removesuffix("]")


def _origins(text: str) -> list[str]:
    """Read origins: one, several with commas, or a JSON list, as vLLM's flag.

    Raises StartupError where one is no origin, so no browser would ever send it.
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


def _modes(given: object) -> object:
    """Read modes with commas between, or StartupError; None where the text is empty."""
    if not isinstance(given, str):
        return given
    modes = [mode.strip() for mode in given.split(",")] if given else None
    for mode in modes or ():
        if mode not in mode_names():
            told = f"--allowed-reasoning-modes: {mode!r} is not one of {', '.join(mode_names())}"
            raise StartupError(told, param="--allowed-reasoning-modes")
    return modes


def flag(group: Group, default: Any, text: str, words: Any = None, **more: Any) -> Any:
    """Declare a field that is a flag too, in a group of --help; a default of None is told in `text`.

    `words` are argparse's options where the field's type does not say them, `more` are of pydantic's
    Field: the range (ge, le, lt), and `alias` where the flag has another name.
    """
    return Field(default, title=group, description=text, json_schema_extra=words, **more)


def kind_of(field: FieldInfo) -> tuple[Any, tuple[Any, ...]]:
    """The type of a flag but for None, and its values where they can be counted."""
    kind: Any = field.annotation
    kind = get_args(kind)[0] if NoneType in get_args(kind) else kind
    words: Any = field.json_schema_extra or {}
    choices = get_args(kind) if get_origin(kind) is Literal else words.get("choices", tuple)()
    return kind, choices


def bounds_of(field: FieldInfo) -> dict[str, Any]:
    """The range of a flag: ge, and le or lt; empty if it has none."""
    return {k: getattr(m, k) for m in field.metadata for k in ("ge", "le", "lt") if hasattr(m, k)}


class Record(BaseModel):
    """Frozen settings; what is wrong is a StartupError that names the flag."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, from_attributes=True
    )

    @classmethod
    def flags(cls) -> dict[str, FieldInfo]:
        """Every flag by its name, in the order of --help."""
        found = {own.alias or name: own for name, own in cls.model_fields.items() if own.title}
        return dict(sorted(found.items(), key=lambda item: get_args(Group).index(item[1].title)))

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_flag(cls, values: Any, check: Callable[[Any], Self]) -> Self:
        try:
            return check(values)
        except ValidationError as error:
            first = error.errors()[0]
        given, told = str(first["loc"][0]), f": {first['msg']}"
        own = cls.model_fields.get(given) or cls.flags().get(given)
        name = (own and own.alias) or given
        if own and first["type"].startswith(("greater_than", "less_than")):
            low, *high = bounds_of(own).values()
            told = f" must be in {low}..{high[0]}" if high else f" must be at least {low}"
        raise StartupError(option(name) + told, param=option(name))


# A declaration reads like the row of a table, so it is laid out by hand.
# fmt: off


class SequenceFlags(Record):
    """What the HTTP side and engines agree on."""

    max_num_seqs: int = flag("Limits", 64, "sequences that run at once", ge=1)


class EngineFlags(SequenceFlags):
    """How an engine runs its model, as far as users say."""

    dtype: DType = flag("Model", "auto", "of weights and cache")  # auto: bfloat16 where the CPU or GPU computes in it, else float32
    max_model_len: int | None = flag("Model", None, "positions a sequence may have; default: the model's", ge=2)  # at most what the cache holds
    device: Device = flag("Engine", "auto", "where to run")
    kv_cache_memory: str = flag("Engine", "auto", "size of the KV cache: bytes, 2GiB, 40% of free memory, or auto: on CPU what --max-num-seqs sequences need, at most 2GiB")
    block_size: int | None = flag("Engine", None, "positions of a KV block; default: 16, or what vLLM picks", ge=1)
    max_num_batched_tokens: int | None = flag("Engine", None, "positions a step computes at most; default: 512 on CPU, 2048 on CUDA, what vLLM picks there", ge=1)

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        if self.kv_cache_memory != "auto":
            parse_memory(self.kv_cache_memory, 0)
        return self


class EngineConfig(EngineFlags):
    """How an engine runs its model."""

    model: Path  # directory in Hugging Face layout
    enable_prefix_caching: bool = True
    show_progress: bool = False


class StubConfig(Record):
    """How the stub engine behaves."""

    ttft_seconds: float = flag("Stub engine", 0.0, "time to first token", ge=0, alias="stub_ttft_seconds")
    tokens_per_second: float = flag("Stub engine", 0.0, "speed; 0 = at once", ge=0, alias="stub_tokens_per_second")
    fail_after_requests: int | None = flag("Stub engine", None, "die at the request after these", alias="stub_fail_after_requests")
    fail_at_token: int | None = flag("Stub engine", None, "fail each request at this position", alias="stub_fail_at_token")


class ServeConfig(SequenceFlags):
    """How the HTTP side behaves."""

    commit: str = "unknown"  # of the source; images tell it in COCONUT_COMMIT
    max_body_bytes: int = 4 * 1024 * 1024
    keep_alive_seconds: float = 15.0
    max_send_seconds: float = 60.0  # a client that reads nothing for so long is dropped
    served_model_name: str = flag("Model", "", "name clients use; default: MODEL, a directory's last part")

    default_reasoning_mode: str | None = flag("Reasoning", None, "mode of requests that name none; default: the model's", {"choices": mode_names})
    allowed_reasoning_modes: Annotated[tuple[str, ...] | None, BeforeValidator(_modes)] = flag("Reasoning", None, "comma-separated; default: all the model supports")
    max_trace: TraceLevel = flag("Reasoning", "topk", "most detailed trace; vectors adds replay")
    min_trace: TraceLevel = flag("Reasoning", "none", "least reasoning.trace of each answer")
    reasoning_field: ReasoningField = flag("Reasoning", "both", "name of thinking text in answers")
    strict_params: bool = flag("Reasoning", False, "answer 400 to unknown request fields")

    host: str = flag("HTTP", "127.0.0.1", "address to listen on; :: is all, IPv4 too", {"type": _host})
    port: int = flag("HTTP", 8000, "port to listen on; 0 picks a free one", ge=0, le=65535)
    uds: str | None = flag("HTTP", None, "unix socket to listen on instead of host and port", _FILE)
    root_path: str = flag("HTTP", "", "path that a proxy in front puts before ours, such as /llm")
    allowed_origins: tuple[str, ...] = flag("HTTP", (), 'web pages that may ask (CORS): "*", or a list or JSON list of origins; may be repeated', {"type": _origins, "action": "extend"})
    ssl_certfile: str | None = flag("HTTP", None, "certificate of the server: HTTPS", _FILE)
    ssl_keyfile: str | None = flag("HTTP", None, "its key; default: in the file of the certificate", _FILE)
    ssl_ca_certs: str | None = flag("HTTP", None, "authorities of clients' certificates", _FILE)
    ssl_cert_reqs: Literal[0, 1, 2] = flag("HTTP", 0, "clients' certificates: 0 not asked for, 1 optional, 2 required")
    api_keys: tuple[str, ...] = flag("HTTP", (), "key that clients must send; may be repeated", {"action": "append"}, alias="api_key", repr=False)
    disable_ui: bool = flag("HTTP", False, "serve no pages: /playground, /docs")

    max_queue: int = flag("Limits", 256, "sequences that may wait; more are answered 429", ge=0)
    max_n: int = flag("Limits", 8, "choices a request may ask for", ge=1)
    drain_seconds: float = flag("Limits", 30.0, "how long SIGTERM waits for running requests", ge=0, lt=86_400)

    metrics_port: int | None = flag("Metrics and logs", None, "also serve /metrics on this port, without a key; 0 picks one", ge=0, le=65535)
    log_format: LogFormat = flag("Metrics and logs", "text", "of the log: lines of text or of JSON")
    otlp_traces_endpoint: str | None = flag("Metrics and logs", None, "send a span a request to this address (OTLP over HTTP)")
    vllm_metric_aliases: bool = flag("Metrics and logs", False, "show metrics under vLLM's names too")

    @model_validator(mode="after")
    def _check_http(self) -> Self:
        path = self.root_path
        is_path = not path or (path.startswith("/") and not path.endswith("/"))
        _require(is_path, "--root-path", "must begin with / and not end with it")
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs"):
            is_used = not getattr(self, name) or self.ssl_certfile is not None
            _require(is_used, option(name), "needs --ssl-certfile")
        has_authorities = not self.ssl_cert_reqs or self.ssl_ca_certs is not None
        _require(has_authorities, "--ssl-cert-reqs", "needs --ssl-ca-certs")
        levels = get_args(TraceLevel)
        has_range = levels.index(self.min_trace) <= levels.index(self.max_trace)
        _require(has_range, "--min-trace", "must be at most --max-trace")
        _require(all(self.api_keys), "--api-key", "must not be empty")
        return self


class ModelFlags(Record):
    """Which model is served, and what runs it."""

    model: str  # directory, hub name or built-in: no flag, but MODEL
    generation_config: Literal["auto", "none"] = flag("Model", "auto", "auto: the model's sampling defaults")
    engine: EngineName = flag("Engine", "native", "what runs the model")


class Settings(EngineFlags, ModelFlags, ServeConfig, StubConfig):
    """All that `serve` is told. In a group of --help, the flags of later bases come first."""

    no_prefix_caching: bool = flag("Engine", False, "recompute prompts that were seen before")
    custom_histogram_buckets: dict[str, tuple[float, ...]] = flag("Metrics and logs", {}, 'bounds of histograms, such as {"latent_steps": [1, 10]}; families: ' + ", ".join(BUCKETS), {"type": parse_buckets, "metavar": "JSON"})
    more_flags: tuple[str, ...] = ()  # after --, for vLLM

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine != "vllm":
            if self.more_flags:
                raise StartupError(f"{self.more_flags[0]} after -- needs --engine vllm", param="--")
        elif self.vllm_metric_aliases:
            told = "--vllm-metric-aliases: the vllm engine shows vLLM's own metrics"
            raise StartupError(told, param="--vllm-metric-aliases")
        elif self.device == "cpu":
            raise StartupError("--device cpu: the vllm engine runs where vLLM does", param="--device")
        return self

    def part(self, kind: type[_Part], **more: Any) -> _Part:
        """Build a smaller record: its flags from here, the rest from `more`."""
        return kind(**{name: value for name, value in self if name in kind.model_fields} | more)
# fmt: on

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def format_memory(num_bytes: int) -> str:
    """Write bytes as people read them: 2.0 GiB, 512 KiB."""
    unit = next((u for u in ("GiB", "MiB", "KiB") if num_bytes >= _UNITS[u.lower()]), "B")
    size = num_bytes / _UNITS[unit.lower()]
    return f"{size:.1f} {unit}" if unit == "GiB" else f"{size:.0f} {unit}"


def parse_memory(text: str, free_bytes: int) -> int:
    """Turn "2GiB", "512MB", "40%" (of `free_bytes`) or plain bytes into bytes.

    Raises:
        StartupError: The text is none of these forms.
    """
    value = text.strip().lower()
    try:
        if value.endswith("%"):
            share = float(value[:-1])
            if not 0 < share <= 100:
                raise ValueError(value)
            return int(free_bytes * share / 100)
        digits = value.rstrip("bkmgi")
        return int(float(digits) * _UNITS[value[len(digits) :] or "b"])
    except (ValueError, KeyError, OverflowError):
        told = f"--kv-cache-memory {text!r} is not a size: give bytes, 512MiB, 2GiB or 40%"
        raise StartupError(told, param="--kv-cache-memory") from None
