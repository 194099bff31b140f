"""Text comes whole: no half characters, no stop strings, nothing lost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from coconut_serve.service.detokenize import Detokenizer
from coconut_serve.service.tokenizer import ByteTokenizer


def feed(
    text: str, stop: tuple[str, ...] = (), include_stop: bool = False
) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(ByteTokenizer(), stop=stop, include_stop=include_stop)
    pieces = [detokenizer.push(i) for i in text.encode()]
    pieces.append(detokenizer.flush())
    return pieces, detokenizer


@given(st.text())
def test_pieces_join_to_the_text_and_split_no_character(text: str) -> None:
    pieces, _ = feed(text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=300)
@given(
    st.text(alphabet="abé"),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """The stop that is complete first wins; at the same place, the one that starts first."""
    pieces, detokenizer = feed(text, tuple(stop))
    shown = "".join(pieces)
    # Find the shortest prefix of the text (by characters) that holds a stop string.
    for end in range(len(text) + 1):
        found = [text[:end].find(s) for s in stop if s in text[:end]]
        if found:
            assert shown == text[: min(found)]
            assert detokenizer.stopped_by in stop
            return
    assert shown == text
    assert detokenizer.stopped_by is None


def test_stop_string_may_be_kept() -> None:
    pieces, detokenizer = feed("hello END world", ("END",), include_stop=True)
    assert "".join(pieces) == "hello END"
    assert detokenizer.stopped_by == "END"
    assert detokenizer.push(65) == ""


def test_beginning_of_a_stop_string_is_held_until_it_is_clear() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), stop=("abc",))
    assert [detokenizer.push(i) for i in b"xab"] == ["x", "", ""]
    assert detokenizer.push(ord("d")) == "abd"
    assert detokenizer.push(ord("a")) == ""
    assert detokenizer.flush() == "a"


def test_broken_bytes_become_replacement_characters() -> None:
    pieces, _ = feed("")
    assert pieces == [""]
    detokenizer = Detokenizer(ByteTokenizer())
    text = detokenizer.push(0xE2) + detokenizer.push(0x82) + detokenizer.push(65)
    assert text + detokenizer.flush() == "\ufffdA"


def test_model_without_tokenizer_has_no_text() -> None:
    detokenizer = Detokenizer(None, stop=("a",))
    assert detokenizer.push(97) == detokenizer.flush() == ""


def test_stop_strings_wait_for_min_tokens() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), stop=("s",), min_tokens=3)
    assert "".join(detokenizer.push(i) for i in b"asksxs") == "ask"
    assert detokenizer.stopped_by == "s"
