"""Ids and text are those of tokenizer.json, and text continues what came before it."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from coconut_serve.checkpoint.tokenizer import HFTokenizer, _obey, load_tokenizer
from coconut_serve.errors import StartupError
from tests import tokenizer_files

pytestmark = pytest.mark.torch  # transformers imports it
TEXTS = ("hello world", " lead", "def fib(n):\n    return n", "a  b \U0001f999\u00e9 12")


def load(directory: Path) -> HFTokenizer:
    loaded = load_tokenizer(directory)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> tuple[HFTokenizer, Tokenizer]:
    directory = tmp_path_factory.mktemp("llama2")
    own = tokenizer_files.llama2(directory)
    return load(directory), own


@pytest.fixture(scope="module")
def bytelevel(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    directory = tmp_path_factory.mktemp("bytes")
    tokenizer_files.byte_level(directory)
    return load(directory)


@pytest.mark.parametrize("name", ["byte_level", "llama2"])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer"])
def test_the_file_says_how_text_is_read(tmp_path: Path, name: str, kind: str) -> None:
    """Classes put their own rules in its place: spaces vanished (DeepSeek's distilled models)."""
    build = getattr(tokenizer_files, name)
    own = build(tmp_path, tokenizer_class=kind, legacy=True, clean_up_tokenization_spaces=True)
    tokenizer = load(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == own.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == own.decode(ids)
        assert tokenizer.encode(text, add_special_tokens=True) == own.encode(text).ids


def test_added_tokens_of_the_config_are_tokens(tmp_path: Path) -> None:
    own = tokenizer_files.byte_level(tmp_path)
    number = own.get_vocab_size()
    added = {str(number): {"content": "quick brown", "special": False}}
    tokenizer_files.byte_level(tmp_path, added_tokens_decoder=added)
    assert load(tmp_path).encode("quick brown", add_special_tokens=False) == [number]


def test_samples_that_are_read_otherwise_refuse_the_start(tmp_path: Path) -> None:
    tokenizer_files.byte_level(tmp_path / "a")
    tokenizer_files.llama2(tmp_path / "b")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "a")
    with pytest.raises(StartupError, match=r"tokenizer\.json: tokenizer_config\.json changes"):
        _obey(tokenizer, tmp_path / "b" / "tokenizer.json")


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "ByT5Tokenizer"])
def test_a_class_without_a_vocabulary_is_refused(tmp_path: Path, kind: str) -> None:
    """A download that stopped: every prompt was empty, or a traceback."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(StartupError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_characters_in_parts_are_held_whatever_the_decoder(tmp_path: Path) -> None:
    tokenizer_files.byte_level(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "@"}, "content": "@"}
    data["decoder"] = {"type": "Sequence", "decoders": [replace, data["decoder"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load(tmp_path)
    text = "\u00e9 \u4f60\u597d a"
    stream = tokenizer.stream()
    shown = "".join(map(stream.push, tokenizer.encode(text, add_special_tokens=False)))
    assert shown == text


def test_a_limit_of_the_file_cuts_no_prompt(tmp_path: Path) -> None:
    tokenizer_files.byte_level(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert len(load(tmp_path).encode("x y z" * 9, add_special_tokens=False)) > 4


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_text_continues_its_prompt(
    sentencepiece: tuple[HFTokenizer, Tokenizer], before: str, after: str
) -> None:
    """The first space of an answer was lost where a tokenizer strips one."""
    tokenizer, _ = sentencepiece
    ids = tokenizer.encode(before + " x" + after, add_special_tokens=True)
    for cut in range(1, len(ids) + 1):
        known = tokenizer.stream()
        shown = "".join(known.push(i) for i in ids[:cut])
        stream = tokenizer.stream(context=ids[:cut])
        rest = "".join(stream.push(i) for i in ids[cut:])
        assert shown + rest == tokenizer.decode(ids)


def test_names_of_tokens_are_what_they_add(sentencepiece: tuple[HFTokenizer, Tokenizer]) -> None:
    """Two tokens had one name, so that 20 log-probabilities came as 19."""
    tokenizer, own = sentencepiece
    names = {i: tokenizer.token_bytes(i) for i in range(own.get_vocab_size())}
    assert names[tokenizer_files.id_of(own, "\u2581capital")] == b" capital"
    assert names[tokenizer_files.id_of(own, "<0xF0>")] == b"\xf0"
    assert names[tokenizer_files.id_of(own, "<|im_end|>")] == b"<|im_end|>"
    text = [i for i in names if tokenizer.raw_bytes(i) is None]
    assert len({names[i] for i in text}) == len(text)
    ids = tokenizer.encode("caf\u00e9 \U0001f999!", add_special_tokens=False)
    assert b"".join(names[i] for i in ids).decode() == " caf\u00e9 \U0001f999!"


def test_nothing_is_lost_after_broken_bytes(sentencepiece: tuple[HFTokenizer, Tokenizer]) -> None:
    """All that followed an unfinished character was lost; one at the end was shown as U+FFFD."""
    tokenizer, own = sentencepiece
    llama, cut = "\U0001f999".encode(), b"\xe4\xbb"
    ids = [
        *tokenizer_files.byte_ids(own, llama + cut),
        tokenizer_files.id_of(own, "\u2581The"),
        *tokenizer_files.byte_ids(own, cut + llama + llama[:3]),
    ]
    stream = tokenizer.stream(context=[tokenizer_files.id_of(own, "\u2581is")])
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == "\U0001f999\ufffd\ufffd The\ufffd\ufffd\U0001f999"
    assert pieces[:4] == ["", "", "", "\U0001f999"]


@settings(deadline=None)
@given(st.lists(st.integers(min_value=6, max_value=399), max_size=30))
def test_byte_level_text_is_what_its_bytes_are(bytelevel: HFTokenizer, ids: list[int]) -> None:
    """Broken bytes too; but for an unfinished character at the end."""
    tokenizer = bytelevel
    stream = tokenizer.stream()
    shown = "".join(stream.push(i) for i in ids) + stream.flush()
    whole = tokenizer.decode(ids)
    assert whole in (shown, shown + "\ufffd")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace") == whole
