"""Torch files of COCONUT and of projects built on its code.

Layout (facebookresearch/coconut, arXiv 2412.06769): `torch.save(state_dict)` in a file named
`checkpoint_N`, keys `base_causallm.NAME` and a copy of the embedding, `embedding.weight`. No
config, tokenizer or step count: those are in a yaml. Variants: multimode.py has no copy of the
embedding. bmarti44/research-pipeline adds `pause_embedding`, one trained vector that all latent
slots are fed instead of hidden states. SIM-CoT (InternLM/SIM-CoT, arXiv 2509.20317) adds its
training decoder, `expainable_llm.NAME`. Reasoning by Superposition
(Ber666/reasoning-by-superposition, arXiv 2505.12514) has a vocabulary of 40.
"""

import json
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from coconut_serve.convert.formats import multimode
from coconut_serve.convert.job import MARKERS, Converted, Job
from coconut_serve.convert.model import build_skeleton, embedding_name, head_name, rename
from coconut_serve.convert.source import Source
from coconut_serve.errors import StartupError

_PREFIX = "base_causallm."
_DECODER = "expainable_llm."  # the authors' spelling
_COPY = "embedding.weight"
_PAUSE = "pause_embedding"
_TEMPLATE = "{question}\n"
_SYMBOLS = (
    *map(str, range(31)), "<|start-latent|>", "<|end-latent|>", "<|latent|>", "|", "[Q]", "[R]",
    "[A]", "<eos>", "<no-answer>",
)  # fmt: skip
_SYMBOLIC_HEADS = 8  # as published; not stored in the files


def recognise(source: Source, method: str | None) -> bool:
    """Match a wrapped causal language model."""
    return bool(source.with_prefix(_PREFIX))


def recognise_simcot(source: Source, method: str | None) -> bool:
    """Match COCONUT with SIM-CoT's decoder."""
    return recognise(source, method) and bool(source.with_prefix(_DECODER))


def recognise_symbolic(source: Source, method: str | None) -> bool:
    """Match COCONUT with two layers and the vocabulary of symbolic graphs."""
    rows = source.tensors.get(f"{_PREFIX}transformer.wte.weight")
    return rows is not None and rows.shape[0] == len(_SYMBOLS) and _num_layers(source) == 2


def recognise_text(source: Source, method: str | None) -> bool:
    """Match a bare state dict in a torch file, as the repository's CoT and no-CoT runs write."""
    embeddings = ("wte.weight", "embed_tokens.weight", "embed_in.weight")
    bare = any(name.endswith(embeddings) for name in source.tensors)
    return source.is_torch_file and bare and method in (None, "cot") and not source.adapter_config


def recognise_multimode(source: Source, method: str | None) -> bool:
    """Match COCONUT with multimode.py's tokens, or --method multimode."""
    is_told = method is None and source.has_tokens(multimode.BEGIN, multimode.END)
    return recognise(source, method) and (is_told or method == multimode.METHOD)


def convert(job: Job) -> Converted:
    """Convert COCONUT; steps = c_thought x stage, 2 x 3 on GSM8K.

    Raises:
        StartupError: It could also be the variant with several modes.
    """
    is_told = _COPY in job.source.tensors or job.source.has_tokens(*MARKERS)
    if job.options.method is None and not is_told:
        raise StartupError(
            f"{job.source.path} has COCONUT's tensors without its {_COPY}, as models of several "
            f"modes ({multimode.BEGIN}, {multimode.END}) do: which is it, --method coconut or "
            f"--method {multimode.METHOD}?",
            param="--method",
        )
    return _convert(job, method="coconut", c_thought=2, stage=3)


def convert_multimode(job: Job) -> Converted:
    """Convert a COCONUT with several modes; 1 x 6 in all published settings."""
    converted = _convert(job, method="coconut", c_thought=1, stage=6, task="")
    told = converted.manifest["tokens"]
    latent = told["latent"]
    begin, end = told["start"]["id"], told["end"]["id"]
    described = multimode.describe(job, converted.config, begin=begin, end=end)
    described["tokens"]["latent"] = latent
    described["tokens"]["never_emit"].append(latent["id"])
    described["prompt"]["template"] = _TEMPLATE
    converted.manifest.update(described)
    return converted


def convert_simcot(job: Job) -> Converted:
    """Convert SIM-CoT on COCONUT, 2 x 5 on GSM8K, without the decoder, which only reads latents."""
    return _convert(job, method="simcot", c_thought=2, stage=5)


def _convert(
    job: Job, *, method: str, c_thought: int, stage: int, task: str = ", GSM8K"
) -> Converted:
    config = job.config()
    skeleton = build_skeleton(config)
    tensors = _unwrap(job)
    pause = tensors.pop(_PAUSE, None)
    tensors = rename(skeleton, tensors, job.report)
    ids = _marker_ids(skeleton, tensors)
    if pause is not None:
        tensors = _with_pause(job, skeleton, tensors, pause, ids[2])
    options = job.options
    if options.c_thought is not None or options.stage is not None:
        c_thought, stage = options.c_thought or c_thought, options.stage or stage
        steps = options.steps or c_thought * stage
    else:
        steps = job.steps(c_thought * stage, f"c_thought {c_thought} x stage {stage}{task}")
    start, end, latent = ({"id": i, "text": text} for i, text in zip(ids, MARKERS, strict=True))
    return Converted(
        config=config,
        tensors=tensors,
        manifest={
            "method": method,
            "modes": ["none", "cot", "latent", "distribution"],
            "default_mode": "latent",
            "tokens": {
                "start": start, "end": end, "latent": latent, "added": True,
                "never_emit": list(ids),
            },
            "prompt": {"template": _TEMPLATE, "chat_template": False, "add_bos": True},
            **({} if pause is None else {"source": "constant"}),
            "steps": steps,
            "trained_steps": [steps],
            "max_steps": max(64, steps),
            "c_thought": c_thought,
            "answer": {"extract": "after:#"},
        },
    )  # fmt: skip


def _unwrap(job: Job) -> dict[str, Tensor]:
    """Return the language model's tensors; drop the embedding's copy and the decoder."""
    model = job.source.with_prefix(_PREFIX)
    decoder = job.source.with_prefix(_DECODER)
    job.report.drop(decoder, "SIM-CoT's training decoder: it only puts latents into words")
    rest = {n: t for n, t in job.source.tensors.items() if n not in model and n not in decoder}
    copy = rest.get(_COPY)
    if copy is not None and any(
        copy.shape == tensor.shape and torch.equal(copy, tensor) for tensor in model.values()
    ):
        job.report.drop({_COPY: rest.pop(_COPY)}, "a copy of the input embedding")
    return {**rest, **{name.removeprefix(_PREFIX): tensor for name, tensor in model.items()}}


def _with_pause(
    job: Job, skeleton: Any, tensors: dict[str, Tensor], pause: Tensor, latent: int
) -> dict[str, Tensor]:
    """Write the trained vector to the latent token's row, which the source "constant" feeds.

    That token is never an input otherwise. The head keeps its old row, so no logit changes.
    """
    embedding, head = embedding_name(skeleton), head_name(skeleton)
    table = tensors[embedding]
    if pause.shape != table.shape[1:]:
        raise StartupError(
            f"{_PAUSE} has shape {list(pause.shape)}, an embedding {list(table.shape[1:])}",
            param="SRC",
        )
    rows = table.clone()
    rows[latent] = pause
    job.report.merge({_PAUSE: pause, embedding: table}, f"{embedding}, row {latent}")
    job.report.note(f"{_PAUSE} is fed in every latent slot: source constant")
    own_head = {head: table} if skeleton.config.tie_word_embeddings else {}
    return {**own_head, **tensors, embedding: rows}


def _marker_ids(skeleton: Any, tensors: dict[str, Tensor]) -> tuple[int, int, int]:
    """Return the ids of start, end and latent: the last three rows, in the order of adding."""
    embedding = tensors.get(embedding_name(skeleton))
    if embedding is None:
        raise StartupError("the checkpoint has no input embedding: another --base?", param="--base")
    rows, base_rows = embedding.shape[0], skeleton.config.vocab_size
    if rows not in (base_rows, base_rows + len(MARKERS)):
        raise StartupError(
            f"the checkpoint has a vocabulary of {rows}, the base model of {base_rows}; COCONUT "
            "adds 3: another base?",
            param="--base",
        )
    return rows - 3, rows - 2, rows - 1


def convert_text(job: Job) -> Converted:
    """Convert a CoT or no-CoT run: an ordinary model without markers."""
    return Converted(
        config=job.config(),
        tensors=dict(job.source.tensors),
        manifest={
            "method": "none",
            "modes": ["cot"],
            "default_mode": "cot",
            "prompt": {"template": "{question}\n", "chat_template": False, "add_bos": True},
            "answer": {"extract": "after:#"},
        },
    )


def convert_symbolic(job: Job) -> Converted:
    """Convert symbolic ProsQA: one latent per hop directly after the prompt, ended by `[A]`."""
    eos = _SYMBOLS.index("<eos>")
    markers = [_SYMBOLS.index(text) for text in MARKERS]
    steps = job.steps(4, "the last stage; a request says its hops")
    tensors = _unwrap(job)
    return Converted(
        config=job.config() if job.options.base or job.source.config else _symbolic_config(tensors),
        tensors=tensors,
        manifest={
            "method": "coconut",
            "modes": ["none", "cot", "latent", "distribution"],
            "default_mode": "latent",
            "tokens": {
                "end": {"id": _SYMBOLS.index("[A]"), "text": "[A]"},
                "latent": {"id": markers[2], "text": MARKERS[2]},
                "pad": {"id": eos, "text": "<eos>"},
                "never_emit": markers,
            },
            "prompt": {"template": "{question}", "chat_template": False, "add_bos": True},
            "steps": steps,
            "trained_steps": [1, 2, 3, 4],
            "variable_steps": True,
        },
        files=_symbolic_tokenizer(),
    )


def _num_layers(source: Source) -> int:
    names = source.with_prefix(f"{_PREFIX}transformer.h.")
    return len({name.split(".")[3] for name in names})


def _symbolic_config(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Derive GPT-2's settings from the tensors, except the number of heads."""
    eos = _SYMBOLS.index("<eos>")
    try:
        size = tensors["transformer.wte.weight"].shape[1]
        positions = tensors["transformer.wpe.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise StartupError(f"the checkpoint lacks {error}", param="SRC") from error
    return {
        "model_type": "gpt2", "vocab_size": len(_SYMBOLS), "n_embd": size, "n_layer": 2,
        "n_head": _SYMBOLIC_HEADS, "n_positions": positions,
        "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos,
    }  # fmt: skip


def _symbolic_tokenizer() -> dict[str, str]:
    """Build a tokenizer that splits at whitespace and prepends `<eos>`."""
    ids = {text: i for i, text in enumerate(_SYMBOLS)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<no-answer>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (*MARKERS, "<eos>")])
    tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", ids["<eos>"])]
    )
    settings = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<eos>")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)}
