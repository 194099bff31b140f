"""Selects the branches of a choice that become its answer."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from coconut_serve.params import Select
from coconut_serve.service.collect import Collected, collect
from coconut_serve.service.generation import Delta, Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A finished branch."""

    text: str
    logprobs: Sequence[float]  # of its answer tokens
    place: int  # in order of ending


def choose(branches: Sequence[Branch], select: Select) -> list[int]:
    """Pick the branches to show.

    Args:
        branches: All of one choice.
        select: first: the one that ended first. vote: the answer that most agree on, of those that
            agree the earliest. logprob: the highest mean log-probability per answer token.
            all: every one.
    """
    everyone = range(len(branches))
    match select:
        case "all":
            return list(everyone)
        case "first":
            return [min(everyone, key=lambda i: branches[i].place)]
        case "vote":
            texts = [branch.text.strip() for branch in branches]
            count = Counter(texts)
            return [max(everyone, key=lambda i: (count[texts[i]], -i))]
        case "logprob":
            return [max(everyone, key=lambda i: fmean(branches[i].logprobs or [float("-inf")]))]


def select_shown(collected: Collected, *, branches: int, select: Select) -> list[Delta]:
    """Keep the branches the client sees, in order of their choices.

    Args:
        collected: `branches` of each choice in a row.
        branches: Of each choice.
        select: As in `choose`.
    """
    choices, shown = collected.choices, list[Delta]()
    if branches == 1:
        return list(choices)
    for start in range(0, len(choices), branches):
        group = choices[start : start + branches]
        ended = [
            Branch(
                text=each.content or str([token.token_id for token in each.tokens]),
                logprobs=[token.logprobs.logprob for token in each.tokens if token.logprobs],
                place=collected.ended.index(each.index),
            )
            for each in group
        ]
        shown += [group[i] for i in choose(ended, select)]
    return shown


async def run_whole(generation: Generation) -> list[Delta]:
    """Run a generation to the end and return the choices that the client sees, renumbered.

    Raises:
        CoconutError: A sequence failed; the others are aborted.
    """
    async with generation:
        collected = await collect(generation, len(generation.choices))
    resolved = generation.prepared.resolved
    shown = select_shown(collected, branches=resolved.branches, select=resolved.select)
    generation.shown = shown[0].index
    return [replace(choice, index=index) for index, choice in enumerate(shown)]
