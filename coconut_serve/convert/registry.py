"""All formats, in the order they are tried. A new one is one function and one line."""

from collections.abc import Callable
from dataclasses import dataclass

from coconut_serve.convert.formats import (
    adaptive,
    coconut,
    codi,
    colar,
    hrpo,
    latent_tts,
    later,
    peft,
    plain,
)
from coconut_serve.convert.job import Converted, Job
from coconut_serve.convert.source import Source
from coconut_serve.errors import StartupError


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A public checkpoint format."""

    name: str
    marks: tuple[str, ...]  # typical parts of tensor or setting names, for the error message
    recognise: Callable[[Source, str | None], bool]  # the checkpoint, --method
    convert: Callable[[Job], Converted]
    methods: tuple[str, ...] = ()  # accepted values of --method


FORMATS = (
    Format(
        name="adaLR",
        marks=("_base_model.", "_inserted_LatentThinkingModelSettings"),
        recognise=adaptive.recognise,
        convert=adaptive.convert,
    ),
    Format(
        name="LaTER",
        marks=("latent_projector.net.",),
        recognise=later.recognise,
        convert=later.convert,
    ),
    Format(
        name="LatentTTS",
        marks=("latent_start_id", "projector.1.", "lt_head."),
        recognise=latent_tts.recognise,
        convert=latent_tts.convert,
    ),
    Format(
        name="CoLaR (Lightning)",
        marks=("llm.", "latent_policy."),
        recognise=colar.recognise,
        convert=colar.convert,
    ),
    Format(
        name="HRPO (PEFT)",
        marks=("thinking_residual_",),
        recognise=hrpo.recognise,
        convert=hrpo.convert,
    ),
    Format(
        name="CODI",
        marks=("codi.", "prj."),
        recognise=codi.recognise_full,
        convert=codi.convert_full,
        methods=("codi", "multimode"),
    ),
    Format(
        name="CODI (PEFT)",
        marks=("base_model.model.", "prj."),
        recognise=codi.recognise_peft,
        convert=codi.convert_peft,
        methods=("codi", "multimode"),
    ),
    Format(
        name="Reasoning by Superposition",
        marks=("base_causallm.", "vocabulary of 40"),
        recognise=coconut.recognise_symbolic,
        convert=coconut.convert_symbolic,
    ),
    Format(
        name="SIM-CoT (Coconut)",
        marks=("base_causallm.", "expainable_llm."),
        recognise=coconut.recognise_simcot,
        convert=coconut.convert_simcot,
    ),
    Format(
        name="COCONUT, several modes",
        marks=("base_causallm.", "<|bocot|>"),
        recognise=coconut.recognise_multimode,
        convert=coconut.convert_multimode,
        methods=("multimode",),
    ),
    Format(
        name="COCONUT",
        marks=("base_causallm.",),
        recognise=coconut.recognise,
        convert=coconut.convert,
        methods=("coconut",),
    ),
    Format(
        name="SWITCH (PEFT)",
        marks=("base_model.model.", "<swi>"),
        recognise=peft.recognise_switch,
        convert=peft.convert_switch,
        methods=("switch",),
    ),
    Format(
        name="Hugging Face with --method",
        marks=("config.json", "--method"),
        recognise=plain.recognise,
        convert=plain.convert,
        methods=(*plain.MIXTURES, "cot"),
    ),
    Format(
        name="COCONUT repository's CoT or no-CoT",
        marks=("a torch file without config.json",),
        recognise=coconut.recognise_text,
        convert=coconut.convert_text,
        methods=("cot",),
    ),
)


def find_format(source: Source, method: str | None) -> Format:
    """Detect the format of a checkpoint.

    Raises:
        StartupError: It matches none; the message says why, or which is nearest.
    """
    for candidate in FORMATS:
        if candidate.recognise(source, method):
            if method not in (None, *candidate.methods):
                known = ", ".join(candidate.methods) or "none"
                raise StartupError(
                    f"{source.path} has the layout of {candidate.name}, which --method {method} is "
                    f"not for (but {known})",
                    param="--method",
                )
            return candidate
    plain.refuse_without_method(source)
    raise StartupError(_unknown(source), param="SRC")


def _unknown(source: Source) -> str:
    text = "\n".join([*source.tensors, *source.config, *source.names])
    scores = {f.name: sum(mark in text for mark in f.marks) / len(f.marks) for f in FORMATS}
    nearest = [name for name, score in scores.items() if score and score == max(scores.values())]
    names = sorted(source.tensors)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    known = "; ".join(f"{f.name} ({', '.join(f.marks)})" for f in FORMATS)
    near = f"Nearest: {', '.join(nearest)}. " if nearest else ""
    return f"{source.path}: unknown layout with tensors {shown}. {near}Known: {known}"
