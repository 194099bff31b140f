"""CoLaR: latents sampled from a Gaussian head.

Layout (xiaomi-research/colar, arXiv 2505.16552): a Lightning `.ckpt` whose `state_dict` holds
only trained parameters: LoRA (rank 128, alpha 32) under `llm.base_model.model.NAME` and
`latent_policy` with fc = Sequential(Linear, GELU, Linear, LayerNorm), `mean` and `log_std`. The
sample is scaled by the standard deviation of the base's embeddings, a table in the authors' code.
"""

from typing import Any

from torch import Tensor

from coconut_serve.convert.job import ADAPTER, Converted, Job, linear
from coconut_serve.convert.lora import split
from coconut_serve.convert.source import Source
from coconut_serve.errors import StartupError

SEPARATOR = "###"
_LLM = "llm."
_POLICY = "latent_policy."
_CAP = 64  # max_n_latent_forward
_EMBEDDING_STD = {
    "llama-3.2-1b": 0.018,
    "llama-3.2-3b": 0.018,
    "llama-3.1-8b": 0.008,
    "deepseek-r1-distill-qwen-1.5b": 0.03,
    "gpt2": 0.12,
}


def recognise(source: Source, method: str | None) -> bool:
    """Match a language model beside a policy."""
    return bool(source.with_prefix(_LLM)) and bool(source.with_prefix(_POLICY))


def convert(job: Job) -> Converted:
    """Merge LoRA into --base; the policy becomes a Gaussian head."""
    source = job.source
    config = job.base_config()
    adapted = split(source.tensors, _LLM)
    known = set(source.with_prefix(_LLM, _POLICY))
    adapted.plain.update({n: t for n, t in source.tensors.items() if n not in known})
    tensors = job.merged(config, adapted)
    return Converted(
        config=config,
        tensors=tensors,
        adapter=gaussian_head(source.tensors, _POLICY),
        manifest={
            **manifest(job, separator=job.need_token(SEPARATOR)),
            "adapters": adapter_of(_embedding_std(job, config)),
        },
    )


def gaussian_head(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the head's parts; without `log_std` it outputs its mean."""
    layers = {"linear_1": "fc.0", "linear_2": "fc.2", "norm": "fc.3", "mean": "mean"}
    if f"{prefix}log_std.weight" in tensors:
        layers["log_std"] = "log_std"
    parts: dict[str, Tensor] = {}
    for part, name in layers.items():
        parts |= linear(part, tensors, prefix + name)
    return parts


def adapter_of(emb_std: float) -> dict[str, Any]:
    """Build the head's entry in the manifest."""
    return {ADAPTER: {"type": "gaussian_head", "activation": "gelu", "emb_std": emb_std}}


def manifest(job: Job, *, separator: dict[str, Any]) -> dict[str, Any]:
    """Build CoLaR's manifest without adapters.

    The separator ends the prompt as text, so it is tokenised together with the text before it.
    Sampling a separator ends the latents, and one is fed before the answer.
    """
    speed = job.options.speed or "5"
    if job.options.speed is None:
        job.report.note("thinking speed 5 assumed; --speed says otherwise")
    steps = job.steps(_CAP, "a cap: the model stops by itself")
    return {
        "method": "colar",
        "modes": ["none", "cot", "latent", "distribution"],
        "default_mode": "latent",
        "tokens": {"end": separator},
        "prompt": {
            "template": "Question: {question} Let's think step by step:"
            f"(Thinking speed: {{speed}}){SEPARATOR}",
            "chat_template": False,
            "add_bos": False,
            "suffix_ids": [],
            "end_ids": [separator["id"]],
            "speed": speed if speed == "auto" else int(speed),
        },
        "steps": steps,
        "max_steps": max(_CAP, steps),
        "variable_steps": True,
        "halting": {
            "rule": "stop_token",
            "token_ids": [separator["id"]],
            "test": "sampled",
            "temperature": 1.0,
            "min_steps": 1,
        },
        "answer": {"extract": "after:Answer:"},
    }


def _embedding_std(job: Job, config: dict[str, Any]) -> float:
    if job.options.emb_std is not None:
        return job.options.emb_std
    base = job.options.base
    names = f"{base.name if base else ''} {config.get('_name_or_path', '')}".lower()
    for name, std in _EMBEDDING_STD.items():
        if name in names:
            job.report.note(f"embedding deviation {std} of {name}, as published")
            return std
    raise StartupError(
        f"no published embedding deviation for this base (known: {', '.join(_EMBEDDING_STD)}): "
        "give --emb-std",
        param="--emb-std",
    )
