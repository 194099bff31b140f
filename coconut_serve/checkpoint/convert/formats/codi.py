"""CODI and SIM-CoT on CODI: a LoRA model and a projection of the hidden state.

Layout (zhenyi4/codi, arXiv 2502.21074; InternLM/SIM-CoT, arXiv 2509.20317): the state dict of a
wrapper, `codi.base_model.model.NAME` as PEFT names it, and `prj` = Sequential(Dropout, Linear,
GELU, Linear, ln=LayerNorm). The embedding has three rows more than the base: pad, start, end.
Config and LoRA scale are on the authors' command line (rank 128, alpha 32); `config.json` is
missing or has 0 bytes. Other projects store the same as a PEFT adapter and a projection.
"""

import re
from typing import Any

from torch import Tensor

from coconut_serve.checkpoint.convert.job import ADAPTER, Converted, Job, linear
from coconut_serve.checkpoint.convert.lora import Adapted, split
from coconut_serve.checkpoint.convert.model import build_skeleton, embedding_name
from coconut_serve.checkpoint.convert.source import Source
from coconut_serve.errors import StartupError

_PREFIX = "codi."
_DECODER = ("decoder.", "expainable_llm.", "pj_in.", "pj_out.")  # SIM-CoT's, of training
_NUM_ADDED = 3  # pad, start, end
_PROJECTION = re.compile(r"(?:(?:.*\.)?prj\.)?((?:1|3|ln)\.(?:weight|bias))")


def recognise_full(source: Source, method: str | None) -> bool:
    """The wrapper's whole state dict."""
    return bool(source.with_prefix(_PREFIX))


def recognise_peft(source: Source, method: str | None) -> bool:
    """A PEFT adapter with a projection."""
    has_lora = any(".lora_A" in name for name in source.tensors)
    return has_lora and bool(_projection(source))


def convert_full(job: Job) -> Converted:
    """The state dict: LoRA merged, the training decoder left out."""
    source = job.source
    decoder = source.with_prefix(*_DECODER)
    job.report.drop(decoder, "SIM-CoT's training decoder: it only puts latents into words")
    adapted = split(source.tensors, _PREFIX)
    known = {*decoder, *source.with_prefix(_PREFIX, "prj.")}
    rest = {name: tensor for name, tensor in source.tensors.items() if name not in known}
    adapted.plain.update(rest)  # there should be none: they are refused by name
    return _convert(job, adapted, method="simcot" if decoder else "codi")


def convert_peft(job: Job) -> Converted:
    """The adapter on top of --base."""
    projection = set(_projection(job.source).values())
    rest = {n: tensor for n, tensor in job.source.tensors.items() if n not in projection}
    return _convert(job, split(rest), method="codi")


def _projection(source: Source) -> dict[str, str]:
    """The projection's tensors: name within it -> name in the checkpoint."""
    matches = {name: _PROJECTION.fullmatch(name) for name in source.tensors}
    return {match[1]: name for name, match in matches.items() if match}


def _convert(job: Job, adapted: Adapted, *, method: str) -> Converted:
    config = job.config()
    tensors = job.merged(config, adapted)
    first = _first_added_row(job, config, tensors)
    eos = _eos(config) if job.options.keep_eos else []
    steps = job.steps(6, "inf_latent_iterations, as published")
    adapter, adapters = _adapter(job.source)
    return Converted(
        config=config,
        tensors=tensors,
        adapter=adapter,
        manifest={
            "method": method,
            "modes": ["none", "cot", "latent", "distribution"],
            "default_mode": "latent",
            "base_model": job.source.adapter_config.get("base_model_name_or_path"),
            "tokens": {
                "pad": {"id": first}, "start": {"id": first + 1}, "end": {"id": first + 2},
                "added": True, "never_emit": [first, first + 1, first + 2],
            },
            "prompt": {
                "template": "{question}", "chat_template": False, "add_bos": True,
                "suffix_ids": [*eos, first + 1], "end_ids": [first + 2, *eos],
            },
            "steps": steps,
            "trained_steps": [steps],
            "max_steps": max(64, steps),
            "adapters": adapters,
            "answer": {"extract": "last_number"},
        },
    )  # fmt: skip


def _adapter(source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The projection's tensors and their place in the manifest; none if trained without."""
    names = _projection(source)
    if not names:
        return {}, {}
    found = {part: source.tensors[name] for part, name in names.items()}
    parts = linear("linear_1", found, "1") | linear("linear_2", found, "3")
    kind = "mlp"
    if "ln.weight" in found:  # else trained with prj_no_ln
        parts |= linear("norm", found, "ln")
        kind = "mlp_ln"
    return parts, {ADAPTER: {"type": kind, "activation": "gelu"}}


def _first_added_row(job: Job, config: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """The id of the pad token: the first of the rows that CODI adds."""
    skeleton = build_skeleton(config)
    embedding = tensors.get(embedding_name(skeleton))
    if embedding is None:
        raise StartupError("the checkpoint has no input embedding: another --base?", param="--base")
    rows = embedding.shape[0]
    if job.options.base is not None:
        base_rows = build_skeleton(job.base_config()).config.vocab_size
        if rows != base_rows + _NUM_ADDED:
            raise StartupError(
                f"the checkpoint has a vocabulary of {rows}, the base model of {base_rows}; CODI "
                f"adds {_NUM_ADDED}: another base, or an adapter saved without its embedding?",
                param="--base",
            )
    return rows - _NUM_ADDED


def _eos(config: dict[str, Any]) -> list[int]:
    eos = config.get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(first, int):
        raise StartupError("--keep-eos: config.json names no eos_token_id", param="--keep-eos")
    return [first]
