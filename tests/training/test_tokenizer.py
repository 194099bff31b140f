"""What a user types becomes the ids that were trained, and ids become readable text."""

from pathlib import Path

import numpy as np
import pytest

from coconut_serve.checkpoint.tokenizer import HFTokenizer, load_tokenizer
from coconut_serve.training import vocabulary
from coconut_serve.training.task import HOPS, cot_ids, draw, prompt_ids, questions
from coconut_serve.training.tokenizer import save_tokenizer

pytestmark = pytest.mark.torch


@pytest.fixture
def tokenizer(tmp_path: Path) -> HFTokenizer:
    save_tokenizer(tmp_path, max_length=256)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    return loaded


@pytest.mark.parametrize("hops", HOPS)
def test_question_text_gives_the_trained_ids(tokenizer: HFTokenizer, hops: int) -> None:
    graphs = draw(np.random.default_rng(1), hops, 20)
    for question, ids in zip(questions(graphs), prompt_ids(graphs).tolist(), strict=True):
        assert tokenizer.encode(question.question, add_special_tokens=True) == ids
        assert tokenizer.encode(question.question.upper(), add_special_tokens=True) == ids


def test_chain_of_thought_reads_as_text(tokenizer: HFTokenizer) -> None:
    graphs = draw(np.random.default_rng(1), 2, 1)
    a, b, c = (vocabulary.NAMES[place] for place in graphs.path[0])
    ids = cot_ids(graphs)[0].tolist()
    assert tokenizer.decode(ids) == f"{a} {b}, {b} {c}, {c}"
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == f"{a} {b}, {b} {c}, ### {c} <eos>"
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_unknown_words_do_not_vanish(tokenizer: HFTokenizer) -> None:
    ids = tokenizer.encode("oslo > atlantis!", add_special_tokens=False)
    assert ids == [vocabulary.FIRST_NAME, vocabulary.UNKNOWN, vocabulary.UNKNOWN]


def test_arrows_of_any_length_are_read(tokenizer: HFTokenizer) -> None:
    plain = tokenizer.encode("oslo rome", add_special_tokens=False)
    for text in ("oslo > rome", "oslo -> rome", "Oslo-->Rome", "oslo>rome?"):
        assert tokenizer.encode(text, add_special_tokens=False) == plain


def test_special_tokens_keep_their_ids_inside_text(tokenizer: HFTokenizer) -> None:
    ids = tokenizer.encode(
        "lima?<|start-latent|><|latent|><|end-latent|>###", add_special_tokens=False
    )
    v = vocabulary
    assert ids == [v.FIRST_NAME + 2, v.START, v.LATENT, v.END, v.ANSWER]
    assert tokenizer.decode(ids) == "lima"
    assert tokenizer.eos_token_ids == (v.EOS,)
