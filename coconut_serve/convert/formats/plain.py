"""Ordinary Hugging Face directories, for methods that change only what is fed back.

Latent-SFT and Latent-GRPO (DJC-GO-SOLO, arXiv 2510.15522 and 2604.27998): softmax over the ten
largest raw logits. SofT-GRPO (zz1358m/SofT-GRPO-master, arXiv 2511.06411): five. Multiplex
(GMLR-Penn/Multiplex-Thinking, arXiv 2601.08808): three sampled tokens.
"""

from typing import Any

from coconut_serve.convert.job import Converted, Job
from coconut_serve.convert.source import Source
from coconut_serve.errors import StartupError

_UNFILTERED = {"temperature": 1.0, "top_p": 1.0, "filter_top_k": 0, "min_p": 0.0}
MIXTURES: dict[str, dict[str, Any]] = {
    "latent_sft": {"kind": "topk", "top_k": 10, **_UNFILTERED},
    "soft_grpo": {"kind": "topk", "top_k": 5, **_UNFILTERED},
    "multiplex": {"kind": "multiplex", "top_k": 3, **_UNFILTERED},
}


def recognise(source: Source, method: str | None) -> bool:
    """Match a whole model with --method."""
    return bool(source.config.get("model_type")) and method in (*MIXTURES, "cot")


def convert(job: Job) -> Converted:
    """Keep the weights; the manifest declares the mixture used in training."""
    method = job.options.method
    assert method is not None
    converted = Converted(
        config=job.config(),
        tensors=dict(job.source.tensors),
        manifest={"method": "none", "modes": ["cot"], "default_mode": "cot"},
    )
    if method == "cot":
        return converted
    mixture = dict(MIXTURES[method])
    if job.options.top_k is not None:
        mixture["top_k"] = job.options.top_k
    think = {"think_start": job.token_id("<think>"), "think_end": job.token_id("</think>")}
    if None in think.values():
        job.report.note("<think> and </think> are no single tokens here: --token names others")
    tokens = {name: {"id": i} for name, i in think.items() if i is not None}
    converted.manifest.update(
        {
            "method": "latent_sft" if method == "latent_sft" else "none",
            "modes": ["none", "cot", "distribution"],
            "default_mode": "distribution",
            "tokens": tokens if len(tokens) == 2 else {},
            "distribution": mixture,
        }
    )
    if method == "soft_grpo":
        job.report.note("SofT-GRPO's Gumbel noise (tau 0.1, clamped) is a request's setting")
    return converted


def refuse_without_method(source: Source) -> None:
    """Refuse an ordinary model and explain the options.

    Raises:
        StartupError: The checkpoint is one.
    """
    if source.config.get("model_type") and not source.is_torch_file:
        raise StartupError(
            f"{source.path} is an ordinary {source.config['model_type']} model: it is served as it "
            "is, or name what it was trained for with --method",
            param="--method",
        )
