"""How large a request's settings may be, and how that is checked."""

from collections.abc import Mapping

from coconut_serve.errors import require

MAX_MIXTURE_TOP_K = 64
MAX_LOGPROBS = 20
MAX_STEPS = 1024
MIN_TEMPERATURE = 1e-3  # below, sampling is greedy: dividing by less overflows float32
MAX_FORCED_TOKENS = 8
MAX_STOP_TOKENS = 32
MAX_HARD_TOKENS = 128
MAX_BRANCHES = 32
MAX_ALLOWED_TOKENS = 1024
MAX_BAD_WORDS = 128  # each as one or two sequences of tokens
MAX_BAD_WORD_TOKENS = 1024  # of all of them

SAMPLING_RANGES = {
    "max_tokens": (1, 2**31), "min_tokens": (0, 2**31), "temperature": (0, 2), "top_p": (0, 1),
    "top_k": (0, 2**31 - 1), "min_p": (0, 1), "repetition_penalty": (0.01, 2),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
}  # fmt: skip
MIXTURE_RANGES = {
    "top_k": (1, MAX_MIXTURE_TOP_K), "temperature": (0.01, 5), "top_p": (0.01, 1),
    "filter_top_k": (0, MAX_MIXTURE_TOP_K), "min_p": (0, 0.99), "noise_temperature": (0.01, 10),
    "dirichlet_alpha": (0.01, 10_000), "moi_beta": (-100, 10**6),
}  # fmt: skip
HALT_RANGES = {
    "stop_temperature": (0.01, 100), "stop_prob": (0, 1), "entropy_below": (0, 20),
    "entropy_above": (0, 20), "entropy_patience": (1, 10**6), "converge_below": (0, 100),
    "converge_patience": (1, 10**6),
}  # fmt: skip
SWITCH_RANGES = {
    "p_max": (0, 1), "window": (0, 10**6), "alpha": (0, 1), "beta": (0, 1),
    "max_switches": (0, 10**6), "answer_tokens": (0, 2**31 - 1),
}  # fmt: skip
REASONING_RANGES = {
    "steps": (0, 2**31), "min_steps": (0, 2**31), "max_blocks": (1, 64), "soft_weight": (0, 1),
    "latent_noise_std": (0, 10), "latent_temperature": (0, 5), "trace_top_k": (1, MAX_LOGPROBS),
    "max_total_steps": (0, 2**31),
}  # fmt: skip
_FIELDS = {"latent_noise_std": "noise_std"}  # name in a request -> field


def check_range(value: float, param: str, bounds: tuple[float, float]) -> None:
    """Raise InvalidRequestError naming `param` unless `value` is in a closed range."""
    low, high = bounds
    require(low <= value <= high, param, f"must be in {low:g}..{high:g}")


def check_ranges(record: object, path: str, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Check fields of a record against closed ranges; `path` is where they stand in a request."""
    for name, bounds in ranges.items():
        check_range(getattr(record, _FIELDS.get(name, name)), path + name, bounds)
