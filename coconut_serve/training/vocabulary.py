"""The demo's vocabulary."""

from typing import Final

NAMES: Final = (
    "oslo", "rome", "lima", "cairo", "paris", "tokyo", "delhi", "quito",
    "accra", "dakar", "hanoi", "seoul", "milan", "turin", "lyon", "porto",
    "bonn", "bern", "riga", "minsk", "sofia", "tunis", "rabat", "doha",
    "dubai", "havana", "lagos", "perth", "sydney", "dublin", "kyiv", "bogota",
)  # fmt: skip
SPECIAL_TOKENS: Final = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<|start-latent|>",
    "<|latent|>",
    "<|end-latent|>",
)
WORDS: Final = (*SPECIAL_TOKENS, ",", "or", "from", "###", *NAMES, "<unk>")

PAD, BOS, EOS, START, LATENT, END, COMMA, OR, FROM, ANSWER, FIRST_NAME = range(11)
UNKNOWN: Final = WORDS.index("<unk>")
VOCAB_SIZE: Final = len(WORDS)
