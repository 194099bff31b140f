"""Frozen, validated configuration; flags > environment (COCONUT_*) > file > defaults."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from coconut_serve.errors import StartupError
from coconut_serve.params import TraceLevel

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
EngineName = Literal["native", "vllm", "stub"]
LogFormat = Literal["text", "json"]
ReasoningField = Literal["both", "reasoning", "reasoning_content"]


def _require(condition: bool, flag: str, message: str) -> None:
    if not condition:
        raise StartupError(f"{flag} {message}", param=flag)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine runs its model."""

    model: Path  # directory in Hugging Face layout
    dtype: DType = "auto"  # auto: bfloat16 where the CPU or GPU computes in it, else float32
    device: Device = "auto"
    max_model_len: int | None = None  # positions; None: the model's, at most what the cache holds
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None  # positions a step; None: 512 on CPU, 2048 on CUDA
    kv_cache_memory: str = "auto"  # bytes ("2GiB"), a share of free memory ("40%"), or auto
    block_size: int | None = None  # positions of a KV block; None: 16, or what vLLM picks
    enable_prefix_caching: bool = True
    show_progress: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.max_num_seqs >= 1, "--max-num-seqs", "must be at least 1")
        size = self.block_size
        _require(size is None or size >= 1, "--block-size", "must be at least 1")
        batched = self.max_num_batched_tokens
        _require(batched is None or batched >= 1, "--max-num-batched-tokens", "must be at least 1")
        length = self.max_model_len
        _require(length is None or length >= 2, "--max-model-len", "must be at least 2")
        if self.kv_cache_memory != "auto":
            parse_memory(self.kv_cache_memory, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StubConfig:
    """How the stub engine behaves; times in seconds, 0 = at once."""

    ttft_seconds: float = 0.0
    tokens_per_second: float = 0.0
    fail_after_requests: int | None = None  # the engine dies at the request after these
    fail_at_token: int | None = None  # each request fails at this position

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.ttft_seconds >= 0, "--stub-ttft-seconds", "must be at least 0")
        _require(self.tokens_per_second >= 0, "--stub-tokens-per-second", "must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """How the HTTP side behaves."""

    served_model_name: str
    commit: str = "unknown"  # of the source; images tell it in COCONUT_COMMIT
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None  # a unix socket instead of host and port
    root_path: str = ""  # what a proxy in front puts before all paths
    ssl_certfile: str | None = None  # None: plain HTTP
    ssl_keyfile: str | None = None  # None: in the file of the certificate
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0  # ssl.VerifyMode: whether clients show certificates
    allowed_origins: tuple[str, ...] = ()  # of web pages that may ask
    metrics_port: int | None = None  # None: /metrics only on the port above
    log_format: LogFormat = "text"
    otlp_traces_endpoint: str | None = None  # None: no traces
    vllm_metric_aliases: bool = False
    api_keys: tuple[str, ...] = ()
    max_num_seqs: int = 64
    max_queue: int = 256
    max_n: int = 8
    max_body_bytes: int = 4 * 1024 * 1024
    default_reasoning_mode: str | None = None
    allowed_reasoning_modes: tuple[str, ...] | None = None
    max_trace: TraceLevel = "topk"
    min_trace: TraceLevel = "none"
    reasoning_field: ReasoningField = "both"
    strict_params: bool = False
    keep_alive_seconds: float = 15.0
    max_send_seconds: float = 60.0  # a client that reads nothing for so long is dropped
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.max_num_seqs >= 1, "--max-num-seqs", "must be at least 1")
        _require(0 <= self.drain_seconds < 86_400, "--drain-seconds", "must be in 0..86400")
        _require(self.max_queue >= 0, "--max-queue", "must be at least 0")
        _require(0 <= self.port <= 65535, "--port", "must be in 0..65535")
        path = self.root_path
        is_path = not path or (path.startswith("/") and not path.endswith("/"))
        _require(is_path, "--root-path", "must begin with / and not end with it")
        for flag in ("--ssl-keyfile", "--ssl-ca-certs", "--ssl-cert-reqs"):
            value = getattr(self, flag.strip("-").replace("-", "_"))
            _require(not value or self.ssl_certfile is not None, flag, "needs --ssl-certfile")
        has_authorities = not self.ssl_cert_reqs or self.ssl_ca_certs is not None
        _require(has_authorities, "--ssl-cert-reqs", "needs --ssl-ca-certs")
        metrics_port = self.metrics_port
        has_port = metrics_port is None or 0 <= metrics_port <= 65535
        _require(has_port, "--metrics-port", "must be in 0..65535")
        _require(self.max_n >= 1, "--max-n", "must be at least 1")
        levels = get_args(TraceLevel)
        has_range = levels.index(self.min_trace) <= levels.index(self.max_trace)
        _require(has_range, "--min-trace", "must be at most --max-trace")
        _require(all(self.api_keys), "--api-key", "must not be empty")


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def format_memory(num_bytes: int) -> str:
    """Write bytes as people read them: 2.0 GiB, 512 KiB."""
    unit = next((u for u in ("GiB", "MiB", "KiB") if num_bytes >= _UNITS[u.lower()]), "B")
    size = num_bytes / _UNITS[unit.lower()]
    return f"{size:.1f} {unit}" if unit == "GiB" else f"{size:.0f} {unit}"


def parse_memory(text: str, free_bytes: int) -> int:
    """Turn "2GiB", "512MB", "40%" or plain bytes into bytes.

    Args:
        text: The flag's value.
        free_bytes: What a percentage refers to.

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
        raise StartupError(
            f"--kv-cache-memory {text!r} is not a size: give bytes, 512MiB, 2GiB or 40%",
            param="--kv-cache-memory",
        ) from None
