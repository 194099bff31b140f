"""The demo's tokenizer, one token per word."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from coconut_serve.training.vocabulary import BOS, SPECIAL_TOKENS, WORDS


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer: lower-case words and commas; drops arrows and question marks.

    A word outside the vocabulary becomes `<unk>`, so that it does not vanish silently.
    """
    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    marks = normalizers.Replace(Regex(r"-*>|\?"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), marks])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    # Joins words with spaces, none before a comma; no word begins with the prefix.
    tokenizer.decoder = decoders.WordPiece(prefix="@@", cleanup=True)
    hidden = [*SPECIAL_TOKENS, "###", "<unk>"]
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in hidden])
    return tokenizer


def save_tokenizer(directory: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for transformers' AutoTokenizer."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
