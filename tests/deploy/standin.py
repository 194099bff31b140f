"""A small random model with all modes, for runs of the deployment where no trained one is at hand.

    python -m tests.deploy.standin FOLDER

What it answers is noise; what it costs is a transformer's work.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.models import save_tiny

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "<latent>")


def write(folder: Path) -> Path:
    """Write config, weights, a byte-level tokenizer and a manifest."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    directory = save_tiny(
        "llama",
        folder,
        vocab_size=len(vocabulary),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    manifest = {
        "schema": 1,
        "method": "coconut",
        "modes": ["none", "cot", "latent", "distribution"],
        "default_mode": "latent",
        "tokens": {"start": {"id": 3}, "end": {"id": 4}, "latent": {"id": 5}},
        "steps": 6,
        "max_steps": 32,
        "variable_steps": True,
    }
    (directory / "latent_config.json").write_text(json.dumps(manifest))
    for file in directory.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone; containers run as another user
    return directory


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
