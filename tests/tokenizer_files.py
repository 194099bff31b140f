"""Small tokenizers in the layouts of public ones; each writes a directory's tokenizer files."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
_TEXTS = [
    "The capital of France is Paris and the capital of Italy is Rome. It is so.",
    "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)\n",
    "the quick brown fox jumps over the lazy dog, 12,345 times; hello world",
]


def byte_level(directory: Path, **config: Any) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama-3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS * 20, trainer)
    return _write(tokenizer, directory, config)


def llama2(directory: Path, **config: Any) -> Tokenizer:
    """SentencePiece with byte tokens, as Llama-2, Mistral 7B v0.1 and TinyLlama have it."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS * 20, trainer)
    tokenizer.pre_tokenizer = None
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][: len(SPECIAL)]  # bytes are plain tokens
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return _write(tokenizer, directory, {"tokenizer_class": "LlamaTokenizerFast", **config})


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Ids of SentencePiece's byte tokens."""
    return [id_of(tokenizer, f"<0x{byte:02X}>") for byte in data]


def id_of(tokenizer: Tokenizer, piece: str) -> int:
    """The id of a piece that is there."""
    found = tokenizer.token_to_id(piece)
    assert found is not None, piece
    return found


def _write(tokenizer: Tokenizer, directory: Path, config: dict[str, Any]) -> Tokenizer:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer
