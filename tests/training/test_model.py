"""The forward that is trained is transformers' own, with or without a cache."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coconut_serve.training.initial import initial_weights
from coconut_serve.training.model import CONFIG, Llama, Mixture
from coconut_serve.training.task import HOPS, draw, prompt_ids
from coconut_serve.training.vocabulary import VOCAB_SIZE

pytestmark = pytest.mark.torch


@pytest.fixture(params=[True, False], ids=["prior", "plain"])
def model(request: pytest.FixtureRequest) -> Llama:
    return Llama(initial_weights(3, has_prior=request.param))


def prompts(hops: int, count: int = 4) -> torch.Tensor:
    return torch.from_numpy(prompt_ids(draw(np.random.default_rng(2), hops, count)))


def load_transformers(model: Llama) -> Any:
    plain = LlamaForCausalLM(LlamaConfig(**CONFIG))
    missing = plain.load_state_dict(model.weights, strict=False)
    assert missing.missing_keys == ["lm_head.weight"], "tied"
    assert not missing.unexpected_keys
    return plain.eval()


@torch.no_grad()
def test_logits_are_those_of_transformers(model: Llama) -> None:
    plain = load_transformers(model)
    for hops in HOPS:
        hidden, _ = model.forward(model.embed(prompts(hops)))
        torch.testing.assert_close(
            model.logits(hidden), plain(prompts(hops)).logits, rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_thoughts_are_the_last_hidden_states_of_a_recomputed_sequence(model: Llama) -> None:
    plain, ids = load_transformers(model), prompts(3)
    hidden, cache = model.forward(model.embed(ids))
    thinking = model.think(hidden[:, -1], cache, 3)
    inputs = plain.get_input_embeddings()(ids)
    for thought in thinking.thoughts.unbind(1):
        last = plain(inputs_embeds=inputs, output_hidden_states=True).hidden_states[-1][:, -1]
        torch.testing.assert_close(thought, last, rtol=1e-4, atol=1e-5)
        inputs = torch.cat([inputs, last[:, None]], dim=1)
    assert thinking.cache.num_positions == ids.shape[1] + 3


@torch.no_grad()
def test_mixture_of_one_token_is_its_embedding_and_of_all_the_mean(model: Llama) -> None:
    hidden, _ = model.forward(model.embed(prompts(2)))
    likeliest = model.logits(hidden[:, -1]).argmax(dim=-1)
    one = model.mix(hidden[:, -1], Mixture(top_k=1))
    torch.testing.assert_close(one, model.embed(likeliest))
    everything = model.mix(hidden[:, -1], Mixture(temperature=1e6))
    mean = model.embed(torch.arange(VOCAB_SIZE)).mean(dim=0).expand_as(everything)
    torch.testing.assert_close(everything, mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prior_attends_from_a_place_to_its_children() -> None:
    """Without the prior a quarter of the tokens' share is what such positions get by chance."""
    graphs = draw(np.random.default_rng(2), 3, 64)
    child_positions = 2 + 3 * np.arange(graphs.edges.shape[1])
    is_child = torch.from_numpy(graphs.edges[:, :, 0] == graphs.path[:, :1])
    mass = {}
    for has_prior in (True, False):
        plain = load_transformers(Llama(initial_weights(3, has_prior=has_prior)))
        plain.set_attn_implementation("eager")
        out = plain(torch.from_numpy(prompt_ids(graphs)), output_attentions=True)
        from_root = out.attentions[1][:, 0, -1, child_positions]
        mass[has_prior] = float((from_root * is_child).sum(dim=1).mean())
    assert mass[True] > 0.5
    assert mass[False] < 0.1
