"""`coconut-serve convert`: its flags, and what it prints. Imports no torch until it runs."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from coconut_serve.errors import StartupError

METHODS = (
    "latent_sft", "soft_grpo", "multiplex", "switch", "cot", "coconut", "codi", "multimode",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user said; None where the format's own or published value is to be used."""

    source: Path
    target: Path
    base: Path | None = None
    method: str | None = None  # for checkpoints that do not tell it themselves
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


def add_parser(commands: Any) -> None:
    """Add the command to the parser of all commands."""
    about = "public checkpoint formats to a directory that both engines serve"
    parser: argparse.ArgumentParser = commands.add_parser("convert", help=about, description=about)
    add = parser.add_argument
    dtypes = ("auto", "float32", "bfloat16", "float16")
    # fmt: off
    add("source", type=Path, metavar="SRC", help="checkpoint file or directory")
    add("target", type=Path, metavar="DST", help="directory to write; must not exist or be empty")
    add("--base", type=Path, metavar="DIR", help="the base model: config, tokenizer, weights")
    add("--method", choices=METHODS, help="what it was trained for, where its files do not say")
    add("--c-thought", type=int, metavar="N", help="COCONUT: latents of one stage")
    add("--stage", type=int, metavar="N", help="COCONUT: last stage; steps = c-thought x stage")
    add("--steps", type=int, metavar="N", help="latent steps; a cap if the model stops by itself")
    add("--lora-alpha", type=float, metavar="X", help="LoRA alpha without adapter_config.json")
    add("--emb-std", type=float, metavar="X", help="CoLaR: deviation of the base's embeddings")
    add("--top-k", type=int, metavar="N", help="distribution methods: tokens mixed in training")
    add("--speed", metavar="N", help="CoLaR: default thinking speed, 1-5 or auto")
    add("--keep-eos", action="store_true", help="CODI: trained without remove_eos")
    add("--dtype", default="auto", choices=dtypes, help="of what is written; auto: as it is")
    add("--token", action="append", default=[], metavar="TEXT=ID",
        help="id of a token that no tokenizer here has; may be repeated")
    # fmt: on


def parse_options(args: argparse.Namespace) -> Options:
    """Turn parsed flags into options.

    Raises:
        StartupError: A value is out of range or not of its form.
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


def run(args: argparse.Namespace) -> int:
    """Convert and print the report; the exit status.

    Raises:
        StartupError: The checkpoint cannot be converted; nothing was written.
    """
    options = parse_options(args)
    from coconut_serve.checkpoint.convert.pipeline import convert

    report = convert(options)
    print("\n".join(report.lines()))
    print(f"wrote {options.target}; serve it with: coconut-serve serve {options.target}")
    return 0
