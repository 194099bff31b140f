"""LatentTTS: COCONUT, CODI and CoLaR as Hugging Face classes.

Layout (ModalityDance/LatentTTS, arXiv 2510.07745): config.json with `latent_id`,
`latent_start_id`, `latent_end_id`; CODI adds `projector` and keys `projector.1/3/4.*` (4 is the
LayerNorm); CoLaR adds `latent_embedding_std` and `lt_head.fc.0/2/3.*`, `lt_head.mean.*`.
"""

from typing import Any

from torch import Tensor

from coconut_serve.convert.formats import colar
from coconut_serve.convert.job import ADAPTER, MARKERS, Converted, Job, linear
from coconut_serve.convert.source import Source
from coconut_serve.errors import StartupError

_IDS = ("latent_start_id", "latent_end_id", "latent_id")
_OWN_SETTINGS = (
    *_IDS, "target_id", "projector", "projector_hidden_size", "projector_dropout",
    "latent_intermediate_size", "latent_embedding_std",
)  # fmt: skip
_ADAPTERS = ("projector.", "lt_head.")


def recognise(source: Source, method: str | None) -> bool:
    """Match the three ids in config.json."""
    return all(name in source.config for name in _IDS)


def convert(job: Job) -> Converted:
    """Convert one of the three methods, distinguished by the adapter's keys."""
    source = job.source
    ids = [source.config[name] for name in _IDS]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise StartupError(f"config.json: {', '.join(_IDS)} are not set: {ids}", param="SRC")
    own = set(source.with_prefix(*_ADAPTERS))
    config = {key: value for key, value in source.config.items() if key not in _OWN_SETTINGS}
    config["model_type"] = _model_type(config)
    adapter, adapters = _adapter(source)
    manifest = _colar(job, ids) if "lt_head.mean.weight" in own else _fixed(job, ids, bool(adapter))
    return Converted(
        config=config,
        tensors={name: t for name, t in source.tensors.items() if name not in own},
        adapter=adapter,
        manifest={**manifest, "adapters": adapters},
    )


def _model_type(config: dict[str, Any]) -> str:
    """Find transformers' name: the authors' classes derive from its own and keep its name."""
    name = f"{config.get('model_type', '')} {config.get('architectures', '')}".lower()
    for known in ("gpt2", "llama", "qwen2"):
        if known in name:
            return known
    return str(config.get("model_type", ""))


def _adapter(source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = source.tensors
    if source.with_prefix("lt_head."):
        std = source.config.get("latent_embedding_std")
        if not isinstance(std, float | int):
            raise StartupError("config.json has no latent_embedding_std", param="SRC")
        return colar.gaussian_head(tensors, "lt_head."), colar.adapter_of(float(std))
    if not source.with_prefix("projector."):
        if source.config.get("projector"):
            raise StartupError(
                "config.json says projector, but its tensors are missing", param="SRC"
            )
        return {}, {}
    parts = linear("linear_1", tensors, "projector.1") | linear("linear_2", tensors, "projector.3")
    if "projector.4.weight" not in tensors:
        return parts, {ADAPTER: {"type": "mlp", "activation": "gelu"}}
    parts |= linear("norm", tensors, "projector.4")
    return parts, {ADAPTER: {"type": "mlp_ln", "activation": "gelu"}}


def _tokens(ids: list[int]) -> dict[str, Any]:
    texts = (MARKERS[0], MARKERS[1], MARKERS[2])
    start, end, latent = ({"id": i, "text": t} for i, t in zip(ids, texts, strict=True))
    return {"start": start, "end": end, "latent": latent, "added": True, "never_emit": ids}


def _fixed(job: Job, ids: list[int], has_projector: bool) -> dict[str, Any]:
    """COCONUT's prompt ends with a newline, CODI's does not."""
    steps = job.steps(6, "latent_length, as published")
    return {
        "method": "codi" if has_projector else "coconut",
        "modes": ["none", "cot", "latent", "distribution"],
        "default_mode": "latent",
        "tokens": _tokens(ids),
        "prompt": {
            "template": "{question}" if has_projector else "{question}\n",
            "chat_template": False,
            "add_bos": True,
        },
        "steps": steps,
        "trained_steps": [steps],
        "max_steps": max(64, steps),
        "answer": {"extract": "last_number" if has_projector else "after:#"},
    }


def _colar(job: Job, ids: list[int]) -> dict[str, Any]:
    start, end, latent = ids
    manifest = colar.manifest(job, separator={"id": end, "text": colar.SEPARATOR})
    manifest["tokens"] |= {"latent": {"id": latent}}
    if start != end:
        manifest["tokens"] |= {"start": {"id": start}}
    return manifest
