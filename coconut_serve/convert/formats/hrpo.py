"""HRPO: a learned gate between the sampled token and the distribution's mean embedding.

Layout (Yueeeeeeee/HRPO, arXiv 2505.18454): a PEFT LoRA adapter with `modules_to_save`
`thinking_residual_gate_r`, `thinking_residual_gate_i` (Linear, Linear) and
`thinking_residual_Lambda` (one vector, `.Lambda`), under `base_model.model.model.`.
"""

from dataclasses import replace

from torch import Tensor

from coconut_serve.convert.job import ADAPTER, Converted, Job, linear
from coconut_serve.convert.lora import split
from coconut_serve.convert.source import Source
from coconut_serve.errors import StartupError

_GATE = "thinking_residual_"
_ANSWER = "####"
_TEMPERATURE = 0.5  # of sampling and mixture, as published


def recognise(source: Source, method: str | None) -> bool:
    """Match the gate's keys."""
    return any(_GATE in name for name in source.tensors)


def convert(job: Job) -> Converted:
    """Merge LoRA into --base; the gate becomes the adapter of the mixture `gated`."""
    adapted = split(job.source.tensors)
    gate = {name: tensor for name, tensor in adapted.plain.items() if _GATE in name}
    plain = {name: tensor for name, tensor in adapted.plain.items() if _GATE not in name}
    config = job.config()
    answer = job.token_id(_ANSWER)
    if answer is None:
        job.report.note(f"{_ANSWER} is no token here: thinking ends at its cap only")
    halting = {"rule": "stop_token", "token_ids": [answer], "test": "sampled"}
    return Converted(
        config=config,
        tensors=job.merged(config, replace(adapted, plain=plain)),
        adapter=_parts(gate),
        manifest={
            "method": "hrpo",
            "modes": ["none", "cot", "distribution"],
            "default_mode": "distribution",
            "base_model": job.source.adapter_config.get("base_model_name_or_path"),
            "boundary": "none",
            "steps": job.steps(1024, f"a cap: thinking ends at {_ANSWER}"),
            "max_steps": 1024,
            "variable_steps": True,
            "adapters": {ADAPTER: {"type": "gate"}},
            "halting": halting if answer is not None else {},
            "distribution": {
                "kind": "gated",
                "temperature": _TEMPERATURE,
                "top_p": 1.0,
                "filter_top_k": 0,
                "min_p": 0.0,
            },
            "answer": {"extract": f"after:{_ANSWER}"},
        },
    )


def _parts(gate: dict[str, Tensor]) -> dict[str, Tensor]:
    short = {name[name.index(_GATE) + len(_GATE) :]: tensor for name, tensor in gate.items()}
    if "Lambda.Lambda" not in short:
        raise StartupError(f"{_GATE}Lambda is missing in the checkpoint", param="SRC")
    parts = linear("gate_r", short, "gate_r") | linear("gate_i", short, "gate_i")
    return {**parts, "lambda": short["Lambda.Lambda"]}
