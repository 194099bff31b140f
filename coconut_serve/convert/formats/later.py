"""LaTER: latent exploration, then explicit thinking.

Layout (TioeAre/LaTER, arXiv 2605.07315): a Qwen3 directory with `model_type` latent_qwen3,
extra settings, and `latent_projector.net` = Sequential(Linear, GELU, Dropout, Linear), keys
`latent_projector.net.0/3.*`, in older files `0/2`.
"""

from typing import Any

from torch import Tensor

from coconut_serve.convert.job import ADAPTER, Converted, Job, linear
from coconut_serve.convert.source import Source

_PROJECTOR = "latent_projector."
_STEPS, _MAX_STEPS = 128, 256  # from the evaluation scripts; the code's default
_OWN_SETTINGS = (
    "latent_", "train_", "discrete_", "enable_", "legacy_staged", "global_stateless",
    "kl_temperature", "supervised_logits",
)  # fmt: skip


def recognise(source: Source, method: str | None) -> bool:
    """Match the model type or the projector's keys."""
    named = source.config.get("model_type") == "latent_qwen3"
    return named or bool(source.with_prefix(_PROJECTOR + "net."))


def convert(job: Job) -> Converted:
    """Convert to a plain Qwen3 with the projector as adapter."""
    own = set(job.source.with_prefix(_PROJECTOR))
    start, end = job.need_token("<latent_think>"), job.need_token("</latent_think>")
    think, no_more = job.need_token("<think>"), job.need_token("</think>")
    steps = job.steps(_STEPS, "a cap: the model stops by itself")
    return Converted(
        config=_plain_config(job.config()),
        tensors={name: t for name, t in job.source.tensors.items() if name not in own},
        adapter=_projector(job.source.tensors),
        manifest={
            "method": "later",
            "modes": ["none", "cot", "latent", "distribution"],
            "default_mode": "latent",
            "tokens": {
                "start": start, "end": end, "think_start": think, "think_end": no_more,
                "added": True, "never_emit": [start["id"], end["id"]],
            },
            "prompt": {"chat_template": True, "end_ids": [think["id"]]},
            "steps": steps,
            "max_steps": max(_MAX_STEPS, steps),
            "variable_steps": True,
            "adapters": {ADAPTER: {"type": "mlp", "activation": "gelu"}},
            # The authors' loop feeds the latent of the stopping step, never the end token.
            "halting": {
                "rule": "stop_token", "token_ids": [end["id"]], "test": "argmax",
                "keeps_last": True,
            },
        },
    )  # fmt: skip


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in config.items() if not key.startswith(_OWN_SETTINGS)}
    return {**plain, "model_type": "qwen3"}


def _projector(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    net = _PROJECTOR + "net."
    second = net + ("3" if f"{net}3.weight" in tensors else "2")
    return linear("linear_1", tensors, net + "0") | linear("linear_2", tensors, second)
