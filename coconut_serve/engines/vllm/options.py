"""Builds the arguments of vLLM's engine from our flags and its own."""

import argparse
import json
from pathlib import Path
from typing import Any

from coconut_serve.config import EngineConfig, parse_memory
from coconut_serve.errors import StartupError

# Arguments that this engine sets -> our flag for each, if there is one.
_OURS = {
    "model": "MODEL",
    "tokenizer": "MODEL",
    "skip_tokenizer_init": None,
    "enable_prompt_embeds": None,
    "logits_processors": None,
    "worker_extension_cls": None,
    "max_logprobs": None,
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "block_size": "--block-size",
    "enable_prefix_caching": "--no-prefix-caching",
    "disable_log_stats": None,
}


def build_engine_args(config: EngineConfig, flags: tuple[str, ...]) -> Any:
    """Build vLLM's AsyncEngineArgs.

    Args:
        config: Our settings.
        flags: vLLM's own, as on its command line.

    Raises:
        StartupError: A flag is unknown to vLLM, or one that this engine sets.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    settings: dict[str, Any] = {
        "model": str(config.model),
        "skip_tokenizer_init": True,
        "enable_prompt_embeds": True,
        "logits_processors": ["coconut_serve.engines.vllm.params:OwnReasoningParamsCheck"],
        "worker_extension_cls": "coconut_serve.engines.vllm.plugin.WorkerStatus",
        "max_logprobs": 10**6,  # the step report takes their place
        "dtype": config.dtype,
        "max_num_seqs": config.max_num_seqs,
        "enable_prefix_caching": config.enable_prefix_caching,
    }
    optional = {
        "max_model_len": config.max_model_len,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "block_size": config.block_size,
    }
    settings |= {name: value for name, value in optional.items() if value is not None}
    settings |= _memory(config.kv_cache_memory)
    return AsyncEngineArgs(**(settings | _read_flags(flags)))


def _memory(text: str) -> dict[str, Any]:
    """A percentage is of all the device's memory, as in vLLM; a size is the cache's."""
    if text == "auto":
        return {}
    if text.strip().endswith("%"):
        return {"gpu_memory_utilization": parse_memory(text, 100) / 100}
    return {"kv_cache_memory_bytes": parse_memory(text, 0)}


def _split(flags: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Split off --lora-modules: vLLM's server knows it, its engine does not."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--lora-modules", nargs="*", default=[])
    known, rest = parser.parse_known_args(list(flags))
    return rest, known.lora_modules


def _read_flags(flags: tuple[str, ...]) -> dict[str, Any]:
    """Parse vLLM's flags with vLLM's parser; return only those that were given."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    rest, adapters = _split(flags)
    if not rest and not adapters:
        return {}
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    try:
        parsed, defaults = vars(parser.parse_args(rest)), vars(parser.parse_args([]))
    except (argparse.ArgumentError, ValueError, SystemExit) as error:
        raise StartupError(f"vLLM does not take {' '.join(rest)!r}: {error}", param="--") from error
    given = {name: value for name, value in parsed.items() if value != defaults[name]}
    for name in given:
        if name in _OURS:
            ours = f"; use {_OURS[name]}" if _OURS[name] else ""
            flag = "--" + name.replace("_", "-")
            raise StartupError(f"{flag} is set by coconut-serve{ours}", param=flag)
    if adapters:
        given["enable_lora"] = True
    return given


def check_device(device: str) -> None:
    """Reject a device that vLLM was not built for: it takes whichever it finds.

    Raises:
        StartupError: CUDA is requested, and vLLM runs elsewhere.
    """
    from vllm.platforms import current_platform

    if device == "cuda" and not current_platform.is_cuda_alike():
        raise StartupError("--device cuda: vLLM sees no CUDA device", param="--device")


def check_adapter(flags: tuple[str, ...]) -> Any:
    """The LoRA adapter that all requests use, as vLLM's LoRARequest; None without one.

    Raises:
        StartupError: It is not NAME=PATH, there are several, or it changes the embedding.
    """
    _, modules = _split(flags)
    if not modules:
        return None
    name, _, path = modules[0].partition("=")
    if len(modules) > 1 or not path:
        raise StartupError("--lora-modules takes one NAME=PATH here", param="--lora-modules")
    try:
        settings = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot read the adapter {path}: {error}", param=path) from error
    touched = (settings.get("target_modules"), settings.get("modules_to_save"))
    if "embed" in json.dumps(touched):  # lists of names, or one pattern
        raise StartupError(
            f"the adapter {name} changes the embedding: soft tokens would miss that",
            param="--lora-modules",
        )
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=1, lora_path=path)
