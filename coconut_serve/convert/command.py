"""`coconut-serve convert`: flags and output. Imports no torch until it runs."""

import argparse
from pathlib import Path
from typing import Any

from coconut_serve.convert.options import METHODS, parse_options


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


def run(args: argparse.Namespace) -> int:
    """Convert, print the report and return the exit status.

    Raises:
        StartupError: The checkpoint cannot be converted; nothing was written.
    """
    options = parse_options(args)
    from coconut_serve.convert.pipeline import convert

    report = convert(options)
    print("\n".join(report.lines()))
    print(f"wrote {options.target}; serve it with: coconut-serve serve {options.target}")
    return 0
