"""SWITCH: LoRA adapters whose model opens and closes latent blocks itself.

Layout (LARK-AI-Lab/SWITCH, arXiv 2606.13106; from the paper and the hub's file list, not from the
authors' code): a PEFT LoRA adapter and a tokenizer with `<swi>` and `</swi>`.
"""

from coconut_serve.convert.job import Converted, Job
from coconut_serve.convert.lora import split
from coconut_serve.convert.source import Source

_OPEN, _CLOSE = "<swi>", "</swi>"


def recognise_switch(source: Source, method: str | None) -> bool:
    """Match a PEFT adapter whose tokenizer has both tokens, or --method switch."""
    has_lora = any(".lora_" in name for name in source.tensors)
    return has_lora and (method == "switch" or source.has_tokens(_OPEN, _CLOSE))


def convert_switch(job: Job) -> Converted:
    """Merge LoRA into --base; tokens that the model samples bound each block."""
    config = job.config()
    start, end = job.need_token(_OPEN), job.need_token(_CLOSE)
    steps = job.steps(64, "a cap of each block: the model closes it by itself")
    return Converted(
        config=config,
        tensors=job.merged(config, split(job.source.tensors)),
        manifest={
            "method": "switch",
            "modes": ["none", "cot", "latent", "distribution"],
            "default_mode": "latent",
            "base_model": job.source.adapter_config.get("base_model_name_or_path"),
            "boundary": "model_emitted",
            "tokens": {"start": start, "end": end, "added": True},
            "prompt": {"chat_template": True},
            "steps": steps,
            "max_steps": max(64, steps),
            "variable_steps": True,
            "halting": {"rule": "stop_token", "token_ids": [end["id"]], "test": "sampled"},
        },
    )
