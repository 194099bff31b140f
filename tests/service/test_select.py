"""Which of several lines of thought becomes the answer, and when they may be asked for."""

from typing import Any

import pytest

from coconut_serve.params import HaltParams, MixtureParams, ReasoningParams
from coconut_serve.service.branches import has_noise
from coconut_serve.service.select import Branch, choose

BRANCHES = [
    Branch(text="7", logprobs=[-3.0], place=2),
    Branch(text=" 8 ", logprobs=[-0.1, -0.3], place=3),
    Branch(text="7", logprobs=[-0.5], place=0),
    Branch(text="9", logprobs=[], place=1),
    Branch(text="8", logprobs=[-1.0], place=4),
]


def test_picks() -> None:
    assert choose(BRANCHES, "all") == [0, 1, 2, 3, 4]
    assert choose(BRANCHES, "first") == [2]
    assert choose(BRANCHES, "logprob") == [1]
    assert choose(BRANCHES, "vote") == [0], "a tie of two: the earliest"
    assert choose(BRANCHES[1:], "vote") == [0]


@pytest.mark.parametrize(
    ("settings", "temperature", "adapter", "expected"),
    [
        ({"mode": "latent"}, 1.0, None, False),
        ({"mode": "latent", "noise_std": 0.1}, 0.0, None, True),
        ({"mode": "latent"}, 0.0, "gaussian_head", True),
        ({"mode": "latent", "latent_temperature": 0.0}, 0.0, "gaussian_head", False),
        ({"mode": "latent"}, 1.0, "mlp_ln", False),
        ({"mode": "latent", "halt": HaltParams(learned_token_ids=(1, 2), sample=True)}, 0.0, None,
         True),
        ({"mode": "distribution"}, 1.0, None, False),
        ({"mode": "distribution", "mixture": MixtureParams(noise="gumbel")}, 0.0, None, True),
        ({"mode": "distribution", "mixture": MixtureParams(kind="full", noise="gumbel")}, 1.0, None,
         False),
        ({"mode": "distribution", "mixture": MixtureParams(kind="multiplex")}, 1.0, None, True),
        ({"mode": "cot"}, 1.0, None, True),
        ({"mode": "cot"}, 0.0, None, False),
        ({"mode": "latent", "noise_std": 0.1, "steps": 0}, 1.0, None, False),
    ],
)  # fmt: skip
def test_only_noise_makes_branches_differ(
    settings: dict[str, Any], temperature: float, adapter: str | None, expected: bool
) -> None:
    params = ReasoningParams(**{"steps": 3, **settings})
    assert has_noise(params, temperature, adapter) is expected
