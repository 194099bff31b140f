"""Known formats that cannot be converted, with the reason and an alternative."""

from pathlib import Path

from coconut_serve.convert.source import read_json
from coconut_serve.errors import StartupError

_PLUGIN = "it needs its own model code: serve it with vLLM and a model plugin, or transformers"
_MODEL_TYPES = {
    "pccot": (
        "PCCoT (arXiv 2506.18582) refines all latents together in several passes over the same "
        "cache slots, which feeding them one by one does not equal: use whyNLP/PCCoT"
    ),
    "huginn": f"Huginn (arXiv 2502.05171) loops its core layers; {_PLUGIN}",
    "raven": f"Huginn (arXiv 2502.05171) loops its core layers; {_PLUGIN}",
    "ouro": f"Ouro (LoopLM) loops its whole stack; {_PLUGIN}",
    "tah": f"TaH loops its stack for hard tokens, with attention of its own; {_PLUGIN}",
    "loopcoder": f"LoopCoder loops its stack; {_PLUGIN}",
}
_FILES = {"pccot_args.json": "pccot", "tah_config.json": "tah"}


def check(path: Path) -> None:
    """Refuse such formats by config.json or a characteristic file, before reading weights.

    Raises:
        StartupError: The checkpoint is one of them.
    """
    directory = path if path.is_dir() else path.parent
    for name, kind in _FILES.items():
        if (directory / name).is_file():
            raise StartupError(f"{path}: {_MODEL_TYPES[kind]}", param="SRC")
    config = read_json(directory / "config.json")
    named = f"{config.get('model_type', '')} {config.get('architectures', '')}".lower()
    for kind, reason in _MODEL_TYPES.items():
        if kind in named.replace("_", ""):
            raise StartupError(f"{path}: {reason}", param="SRC")
