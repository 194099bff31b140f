"""adaLR: latent reasoning that learns when to stop.

Layout (apning/adaptive-latent-reasoning, arXiv 2511.21581): a Hugging Face directory whose
config.json is the base model's plus `_inserted_LatentThinkingModelSettings`; keys
`_base_model.NAME`, `recurrent_filter.*`, and with `lora_mode` separate rows of the special tokens
(`_start_embed.weight`, ...). After each latent, the CONTINUE and STOP rows of lm_head decide.
"""

from typing import Any

from torch import Tensor

from coconut_serve.convert.job import ADAPTER, Converted, Job, linear
from coconut_serve.convert.model import build_skeleton, embedding_name, head_name
from coconut_serve.convert.source import Source
from coconut_serve.errors import StartupError

_SETTINGS = "_inserted_LatentThinkingModelSettings"
_PREFIX = "_base_model."
_FILTER = "recurrent_filter."
_TEXTS = {"start": "<START>", "end": "<END>", "continue": "<|CONTINUE|>", "stop": "<|STOP|>"}
_CAP = 64  # ours; the authors limit only max_new_tokens


def recognise(source: Source, method: str | None) -> bool:
    """Match the settings in config.json or the wrapper's keys."""
    return _SETTINGS in source.config or bool(source.with_prefix(_PREFIX))


def convert(job: Job) -> Converted:
    """Take tokens and filter from the settings; halt by the CONTINUE and STOP rows."""
    settings = job.source.config.get(_SETTINGS)
    if not isinstance(settings, dict):
        raise StartupError(f"config.json lacks {_SETTINGS}: its token ids are needed", param="SRC")
    config = {key: value for key, value in job.source.config.items() if key != _SETTINGS}
    ids = _token_ids(settings)
    known = {*job.source.with_prefix(_FILTER), *_special_rows(job.source)}
    tensors = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in job.source.tensors.items()
        if name not in known
    }
    if settings.get("lora_mode"):
        tensors = _splice(job, config, tensors, ids)
    mode = settings.get("recurrent_filter_mode")
    adapter, kind = _filter(job.source, mode)
    is_soft = mode == "SRE"  # the filter is the distribution's mean embedding
    unused = settings.get("unused_token_ids") or []
    return Converted(
        config=config,
        tensors=tensors,
        adapter=adapter,
        manifest={
            "method": "adaptive",
            "modes": ["none", "cot", "distribution"] + ([] if is_soft else ["latent"]),
            "default_mode": "distribution" if is_soft else "latent",
            "tokens": {
                "start": {"id": ids["start"], "text": _TEXTS["start"]},
                "end": {"id": ids["end"], "text": _TEXTS["end"]},
                "added": True,
                "never_emit": sorted({*ids.values(), *unused}),
            },
            "prompt": {"template": "Question: {question}", "chat_template": False, "add_bos": True},
            "steps": job.steps(_CAP, "a cap: the model stops by itself"),
            "max_steps": max(_CAP, job.options.steps or 0),
            "variable_steps": True,
            "adapters": {ADAPTER: {"type": kind, "activation": "gelu"}} if kind else {},
            "halting": {
                "rule": "binary_rows",
                "token_ids": [ids["continue"], ids["stop"]],
                "test": "sampled",
                "temperature": float(settings.get("binary_head_temp") or 1.0),
                "end_adds_latent": bool(settings.get("add_latent_to_end")),
            },
            "distribution": _whole_distribution() if is_soft else {},
            "answer": {"extract": "last_number"},
        },
    )


def _whole_distribution() -> dict[str, Any]:
    """Softmax re-embedding (SRE): all tokens at temperature 1, in the latent slots."""
    return {
        "kind": "full", "temperature": 1.0, "top_p": 1.0, "filter_top_k": 0, "min_p": 0.0,
        "slots": "latent",
    }  # fmt: skip


def _token_ids(settings: dict[str, Any]) -> dict[str, int]:
    ids = {name: settings.get(f"{name}_token_id") for name in _TEXTS}
    for name, token_id in ids.items():
        if not isinstance(token_id, int):
            raise StartupError(f"config.json: {_SETTINGS} has no {name}_token_id", param="SRC")
    return {name: int(token_id) for name, token_id in ids.items() if token_id is not None}


def _filter(source: Source, mode: str | None) -> tuple[dict[str, Tensor], str | None]:
    """Return the recurrent filter's tensors and its adapter type."""
    match mode:
        case None | "SRE":
            return {}, None
        case "MLP":
            layers = {"linear_1": "input_layer", "linear_2": "output_layer", "norm": "norm"}
            kind = "mlp_ln"
        case "linear_ln":
            layers, kind = {"linear_1": "linear_layer", "norm": "norm"}, "linear_ln"
        case "linear" | "linear_ECF":  # Linear, RMSNorm, then a separate bias
            layers, kind = {"linear_1": "linear_layer", "norm": "norm"}, "linear_rms"
        case _:
            raise StartupError(f"config.json: unknown recurrent_filter_mode {mode!r}", param="SRC")
    parts: dict[str, Tensor] = {}
    for part, name in layers.items():
        parts |= linear(part, source.tensors, _FILTER + name)
    if kind == "linear_rms":
        if _FILTER + "bias" not in source.tensors:
            raise StartupError(f"{_FILTER}bias is missing in the checkpoint", param="SRC")
        parts["norm.bias"] = source.tensors[_FILTER + "bias"]
    return parts, kind


def _special_rows(source: Source) -> list[str]:
    """Rows kept separate in LoRA training: `_start_embed.weight`, `_stop_embed_out.weight`."""
    return [n for name in _TEXTS for n in source.with_prefix(f"_{name}_embed")]


def _splice(
    job: Job, config: dict[str, Any], tensors: dict[str, Tensor], ids: dict[str, int]
) -> dict[str, Tensor]:
    """Write the special tokens' rows back into embedding and head, as lora_mode_disable does."""
    skeleton = build_skeleton(config)
    embedding, head = embedding_name(skeleton), head_name(skeleton)
    spliced = dict(tensors)
    for name in _special_rows(job.source):
        token, _, place = name.removeprefix("_").removesuffix(".weight").partition("_embed")
        target = head if place == "_out" and head in spliced else embedding
        if not name.endswith(".weight") or target not in spliced:
            raise StartupError(f"{name}: nowhere to put it", param="SRC")
        rows = spliced[target].clone()
        rows[ids[token]] = job.source.tensors[name][0]
        spliced[target] = rows
        job.report.merge({name: job.source.tensors[name]}, f"{target}, row {ids[token]}")
        job.report.accounted.add(id(tensors[target]))
    return spliced
