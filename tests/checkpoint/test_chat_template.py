"""Chats are rendered by transformers' own rules."""

from pathlib import Path
from typing import Any

import pytest

from coconut_serve.errors import InvalidRequestError

pytestmark = pytest.mark.torch

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]


def load(folder: Path) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from coconut_serve.checkpoint.tokenizer import load_tokenizer

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def test_last_message_may_be_continued_or_left(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    answered = "<user>a</s><assistant>b c</s>"
    assert tokenizer.render_chat(MESSAGES) == answered + "<assistant>"
    assert tokenizer.render_chat(MESSAGES, add_generation_prompt=False) == answered
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert tokenizer.render_chat(MESSAGES, **options) == "<user>a</s><assistant>b c"
    with pytest.raises(InvalidRequestError, match="refuses these messages"):
        tokenizer.render_chat(MESSAGES, continue_final_message=True)
