"""The `coconut-serve train` command. Imports no torch until it runs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from coconut_serve.errors import StartupError

if TYPE_CHECKING:
    from coconut_serve.training.recipe import Recipe


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to argparse's subparsers."""
    train = commands.add_parser("train", help="train the demo model, within an hour on a CPU")
    train.add_argument("model", choices=["demo"], help="what to train")
    train.add_argument("--output", required=True, type=Path, metavar="DIR", help="where it goes")
    train.add_argument(
        "--steps-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="make the phases that much longer",
    )
    train.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data")
    for flag, text in (
        ("no-frontier", "do not supervise thoughts by the search frontier"),
        ("no-prior", "start from plain random weights"),
        ("staged", "replace steps by thoughts in stages, as COCONUT does"),
        ("resume", "go on from the checkpoint in DIR"),
    ):
        train.add_argument(f"--{flag}", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Train, write the model's directory and return the exit status.

    Raises:
        StartupError: There is no checkpoint to resume from, or one would be overwritten.
    """
    import torch

    from coconut_serve.training.export import export
    from coconut_serve.training.trainer import Trainer

    checkpoints: Path = args.output / "checkpoint"
    if checkpoints.exists() and not args.resume:
        raise StartupError(f"{checkpoints} exists: --resume goes on from it", param="--output")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(_recipe(args), checkpoints, device=device)
    if args.resume:
        trainer.load()
    trainer.run()
    export(trainer, args.output)
    return 0


def _recipe(args: argparse.Namespace) -> "Recipe":
    import dataclasses

    from coconut_serve.training.recipe import demo_recipe

    if args.steps_scale <= 0:
        raise StartupError("--steps-scale must be more than 0", param="--steps-scale")
    return dataclasses.replace(
        demo_recipe(seed=args.seed, scale=args.steps_scale),
        has_frontier=not args.no_frontier,
        has_prior=not args.no_prior,
        is_staged=args.staged,
    )
