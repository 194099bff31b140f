"""Named settings: presets of published methods, kinds of mixtures, efforts."""

import string
from typing import Any

# Named sets of tokens that `auto` never feeds as mixtures; SwiReasoning's is formula symbols.
HARD_TOKENS: dict[str, tuple[str, ...]] = {
    "none": (),
    "math": tuple(string.ascii_letters + string.digits + "+-*/=^<>()"),
}

EOS = "eos"  # in our own token lists: every token that ends the model's answers
# Tokens with a blank line. A large vocabulary has hundreds; these are the common ones, where the
# line follows the end of a sentence, a bracket or a formula.
_BLANK_LINES = tuple(
    mark + "\n\n"
    for mark in ("", " ", "\n", "\n\n", *".:,;!?)]}\"'*`$", "**", "```", "$$", ").", ":**")
)

PRESETS: dict[str, dict[str, Any]] = {
    "coconut": {"mode": "latent", "halt.rule": "fixed"},
    "codi": {"mode": "latent", "halt.rule": "fixed"},
    "adaptive": {"mode": "latent", "halt.rule": "learned"},
    "colar": {"mode": "latent", "halt.rule": "stop_token"},
    "switch": {"mode": "latent"},
    "later_free": {
        "mode": "latent",
        "adapter": "realign",
        "steps": 96,
        "start": ("<think>",),
        "halt.rule": "stop_token",
        "halt.stop_tokens": (EOS, "</think>", "<|endoftext|>", "<|im_end|>", *_BLANK_LINES),
    },
    "swi": {"mode": "auto", "switch.rule": "swi", "switch.hard_tokens": "math"},
    "thinkrouter": {
        "mode": "auto",
        "switch.rule": "confidence",
        "mixture.kind": "topk",
        "halt.entropy_below": 0.01,
    },
    "moi": {
        "mode": "distribution",
        "mixture.kind": "moi",
        "mixture.moi_beta": 1.0,
        "mixture.in_answer": True,
    },
    "multiplex": {"mode": "distribution", "mixture.kind": "multiplex"},
    "latent_sft": {
        "mode": "distribution",
        "mixture.kind": "topk",
        "mixture.top_k": 10,
        "mixture.temperature": 1.0,
        "mixture.top_p": 1.0,
        "mixture.filter_top_k": 0,
        "mixture.min_p": 0.0,
    },
    "latentmas": {"mode": "latent", "adapter": "realign", "steps": 40, "halt.rule": "fixed"},
    "soft_thinking": {
        "mode": "distribution",
        "mixture.kind": "topk",
        "mixture.top_k": 10,
        "mixture.temperature": 0.6,
        "mixture.top_p": 0.95,
        "mixture.filter_top_k": 30,
        "mixture.min_p": 0.001,
        "mixture.noise": "none",
        "halt.entropy_below": 0.01,
        "halt.entropy_patience": 256,
    },
    "stochastic_soft": {
        "mode": "distribution",
        "mixture.kind": "topk",
        "mixture.top_k": 15,
        "mixture.temperature": 0.6,
        "mixture.top_p": 0.95,
        "mixture.filter_top_k": 30,
        "mixture.min_p": 0.0,
        "mixture.noise": "gumbel",
        "mixture.noise_temperature": 0.5,
        "halt.entropy_below": 0.0,
    },
}
# Settings each mixture kind uses, with their defaults.
MIXTURES: dict[str, dict[str, Any]] = {
    "topk": {
        "top_k": 10, "temperature": 0.6, "top_p": 0.95, "filter_top_k": 30, "min_p": 0.001,
        "noise": "none", "norm": "none",
    },
    "full": {"temperature": 1.0, "norm": "none"},
    "multiplex": {
        "top_k": 3, "temperature": 1.0, "top_p": 1.0, "filter_top_k": 0, "min_p": 0.0,
        "weights": "prob", "replacement": True, "norm": "none",
    },
    "moi": {"top_k": 20, "temperature": 1.0, "moi_beta": 1.0, "norm": "none", "in_answer": False},
    "gated": {"temperature": 1.0, "norm": "none", "in_answer": False},
}  # fmt: skip
DEFAULT_KIND = "topk"
# Least harmful defaults for a model without think tokens or soft-token training (docs/methods.md);
# a request that sets anything of mixture or switch replaces all of that part.
UNTRAINED: dict[str, Any] = {"steps": 4, "mixture.temperature": 0.3, "switch.rule": "confidence"}
# Settings each kind of mixture noise uses, with their defaults.
NOISES: dict[str, dict[str, Any]] = {
    "none": {},
    "gumbel": {"noise_temperature": 0.5, "noise_clamp": ()},
    "dirichlet": {"dirichlet_alpha": 4.0},
}
NO_EFFORT = "none"  # OpenAI's: no thinking at all
# reasoning_effort scales the default step budget; NO_EFFORT picks the mode that does not think.
EFFORTS: dict[str, float] = {
    "minimal": 0.25, "low": 0.5, "medium": 1.0, "high": 2.0, "xhigh": 4.0, "max": 8.0,
}  # fmt: skip
