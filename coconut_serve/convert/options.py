"""Options of `coconut-serve convert` and their validation."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from coconut_serve.errors import StartupError

METHODS = (
    "latent_sft", "soft_grpo", "multiplex", "switch", "cot", "coconut", "codi", "multimode",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options from the command line; None means the format's own or published value."""

    source: Path
    target: Path
    base: Path | None = None
    method: str | None = None  # for checkpoints whose files do not reveal it
    c_thought: int | None = None
    stage: int | None = None
    steps: int | None = None
    lora_alpha: float | None = None
    emb_std: float | None = None
    top_k: int | None = None
    speed: str | None = None
    keep_eos: bool = False
    dtype: str = "auto"
    tokens: tuple[tuple[str, int], ...] = ()


def parse_options(args: argparse.Namespace) -> Options:
    """Turn parsed flags into options.

    Raises:
        StartupError: A value is malformed or out of range.
    """
    values = vars(args)
    own = {f.name: values[f.name] for f in fields(Options) if f.name in values}
    for name in ("c_thought", "stage", "steps", "top_k", "lora_alpha", "emb_std"):
        if own[name] is not None and own[name] <= 0:
            flag = "--" + name.replace("_", "-")
            raise StartupError(f"{flag} must be more than 0", param=flag)
    speed = own["speed"]
    if speed is not None and speed != "auto" and speed not in "12345":
        raise StartupError("--speed must be 1-5 or auto", param="--speed")
    tokens = []
    for text in values["token"]:
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal():
            raise StartupError(f"--token {text}: must be TEXT=ID", param="--token")
        tokens.append((name, int(number)))
    return Options(**{**own, "tokens": tuple(tokens)})
