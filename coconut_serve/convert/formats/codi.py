"""CODI and SIM-CoT on CODI: a LoRA model and a projection of the hidden state.

Layout (zhenyi4/codi, arXiv 2502.21074; InternLM/SIM-CoT, arXiv 2509.20317): the state dict of a
wrapper with PEFT's names, `codi.base_model.model.NAME`, and `prj` = Sequential(Dropout, Linear,
GELU, Linear, ln=LayerNorm). The embedding has three more rows than the base: pad, start, end.
The authors set config and LoRA scale on the command line (rank 128, alpha 32); `config.json` is
missing or has 0 bytes. Other projects store the same as a PEFT adapter and a projection. With two
more rows instead of three, it is the variant in multimode.py.
"""

import re
from typing import Any

from torch import Tensor

from coconut_serve.convert.formats import multimode
from coconut_serve.convert.job import ADAPTER, Converted, Job, linear
from coconut_serve.convert.lora import Adapted, split
from coconut_serve.convert.model import build_skeleton, embedding_name
from coconut_serve.convert.source import Source
from coconut_serve.errors import StartupError

_PREFIX = "codi."
_DECODER = ("decoder.", "expainable_llm.", "pj_in.", "pj_out.")  # SIM-CoT's, for training only
_ADDED = {"codi": 3, multimode.METHOD: 2}  # rows: pad, start, end; or start, end
_PROJECTION = re.compile(r"(?:(?:.*\.)?prj\.)?((?:1|3|ln)\.(?:weight|bias))")


def recognise_full(source: Source, method: str | None) -> bool:
    """Match the wrapper's whole state dict."""
    return bool(source.with_prefix(_PREFIX))


def recognise_peft(source: Source, method: str | None) -> bool:
    """Match a PEFT adapter with a projection."""
    has_lora = any(".lora_A" in name for name in source.tensors)
    return has_lora and bool(_projection(source))


def convert_full(job: Job) -> Converted:
    """Convert the state dict: merge LoRA, drop the training decoder."""
    source = job.source
    decoder = source.with_prefix(*_DECODER)
    job.report.drop(decoder, "SIM-CoT's training decoder: it only puts latents into words")
    adapted = split(source.tensors, _PREFIX)
    known = {*decoder, *source.with_prefix(_PREFIX, "prj.")}
    rest = {name: tensor for name, tensor in source.tensors.items() if name not in known}
    adapted.plain.update(rest)  # normally none; `fit` refuses them by name
    return _convert(job, adapted, method="simcot" if decoder else "codi")


def convert_peft(job: Job) -> Converted:
    """Convert the adapter, merged into --base."""
    projection = set(_projection(job.source).values())
    rest = {n: tensor for n, tensor in job.source.tensors.items() if n not in projection}
    return _convert(job, split(rest), method="codi")


def _projection(source: Source) -> dict[str, str]:
    """Map names within the projection to names in the checkpoint."""
    matches = {name: _PROJECTION.fullmatch(name) for name in source.tensors}
    return {match[1]: name for name, match in matches.items() if match}


def _convert(job: Job, adapted: Adapted, *, method: str) -> Converted:
    config = job.config()
    tensors = job.merged(config, adapted)
    rows, added = _added_rows(job, config, tensors, is_simcot=method == "simcot")
    first = rows - added
    eos = tuple(_eos(config) if job.options.keep_eos else ())
    steps = job.steps(6, "inf_latent_iterations, as published")
    adapter, adapters = _adapter(job.source)
    if added == _ADDED[multimode.METHOD]:
        described = multimode.describe(job, config, begin=first, end=first + 1, eos=eos)
        extract = "after:The answer is:"
    else:
        described = _describe(first, eos)
        extract = "last_number"
    described["prompt"]["template"] = "{question}"
    return Converted(
        config=config,
        tensors=tensors,
        adapter=adapter,
        manifest={
            "method": method,
            "modes": ["none", "cot", "latent", "distribution"],
            "default_mode": "latent",
            "base_model": job.source.adapter_config.get("base_model_name_or_path"),
            **described,
            "steps": steps,
            "trained_steps": [steps],
            "max_steps": max(64, steps),
            "adapters": adapters,
            "answer": {"extract": extract},
        },
    )


def _describe(pad: int, eos: tuple[int, ...]) -> dict[str, Any]:
    """Return the manifest's tokens and prompt, without the template."""
    start, end = pad + 1, pad + 2
    return {
        "tokens": {
            "pad": {"id": pad}, "start": {"id": start}, "end": {"id": end},
            "added": True, "never_emit": [pad, start, end],
        },
        "prompt": {
            "chat_template": False, "add_bos": True,
            "suffix_ids": [*eos, start], "end_ids": [end, *eos],
        },
    }  # fmt: skip


def _adapter(source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the projection's tensors and manifest entry; empty if trained without one."""
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


def _added_rows(
    job: Job, config: dict[str, Any], tensors: dict[str, Tensor], *, is_simcot: bool
) -> tuple[int, int]:
    """Count the embedding's rows, and those of them that CODI added.

    Raises:
        StartupError: The base's vocabulary does not match, or the added count is ambiguous.
    """
    embedding = tensors.get(embedding_name(build_skeleton(config)))
    if embedding is None:
        raise StartupError("the checkpoint has no input embedding: another --base?", param="--base")
    rows, method = embedding.shape[0], "codi" if is_simcot else job.options.method
    base = config if job.options.base is None else job.base_config()
    base_rows = build_skeleton(base).config.vocab_size
    counts = [_ADDED[method]] if method else list(_ADDED.values())
    if rows - base_rows in counts:
        return rows, rows - base_rows
    if job.options.base is not None or rows != base_rows:
        raise StartupError(
            f"the checkpoint has a vocabulary of {rows}, the base model of {base_rows}; CODI adds "
            f"{' or '.join(map(str, counts))}: another base, or an adapter saved without its "
            "embedding?",
            param="--base",
        )
    if method is None:
        raise StartupError(
            f"config.json counts the added tokens already: give --base, or say whether there are "
            f"three (--method codi) or {multimode.BEGIN} and {multimode.END} alone (--method "
            f"{multimode.METHOD})",
            param="--method",
        )
    return rows, counts[0]


def _eos(config: dict[str, Any]) -> list[int]:
    eos = config.get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(first, int):
        raise StartupError("--keep-eos: config.json names no eos_token_id", param="--keep-eos")
    return [first]
