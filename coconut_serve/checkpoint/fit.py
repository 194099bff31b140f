"""Checks a directory's tensors against its architecture before reading any."""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from coconut_serve.checkpoint.files import one_line
from coconut_serve.errors import StartupError

logger = logging.getLogger(__name__)

# Prefixes of names in the layouts that `convert` reads, which checkpoint must not import.
FOREIGN_PREFIXES = (
    "_base_model.", "base_causallm.", "base_model.model.", "codi.", "expainable_llm.",
    "latent_policy.", "latent_projector.net.", "llm.", "lt_head.", "prj.", "projector.1.",
)  # fmt: skip
_NUM_SHOWN = 5
# Masks and rotary tables that older versions of transformers wrote beside the weights.
_OLD_BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.\w+$")


def check_weights(directory: Path) -> None:
    """Compare names and shapes in the headers with the model's, using transformers' own loader.

    The loader runs on the meta device, so it allocates nothing, and it knows what is tied, renamed,
    merged or harmless in each architecture. Quantised files, multimodal models and those that
    transformers has no class for are left to the engine.

    Raises:
        StartupError: Tensors are missing, unexpected or of another shape; the text names them.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        logger.info("weights not checked beforehand: %s", one_line(error))
        return
    is_quantised = getattr(config, "quantization_config", None) is not None
    is_larger = config.get_text_config() is not config  # multimodal
    is_known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if is_quantised or is_larger or not is_known:
        logger.info("weights not checked beforehand: they are quantised, or of no plain text model")
        return
    with _reports() as reports:
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=torch.float32,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # inconsistent configs raise nearly anything
            merged = re.findall(r"^(\w\S*) +\|.*CONVERSION", "\n".join(reports), re.MULTILINE)
            if merged:  # experts, merged into one tensor: the loader does not say which are wrong
                raise _misfit(directory, [f"parts of {_some(merged)} do not fit"], []) from error
            raise StartupError(f"cannot load {directory}: {one_line(error)}") from error
    drafts = _draft_layers(config)
    info["unexpected_keys"] = [
        key
        for key in info["unexpected_keys"]
        if not _OLD_BUFFERS.search(key) and not drafts.search(key)
    ]
    refuse_misfits(directory, type(model).__name__, info)


def refuse_misfits(directory: Path, name: str, info: dict[str, Any]) -> None:
    """Refuse weights in which transformers' loader reports a mismatch.

    Args:
        directory: Of the model.
        name: The model's class.
        info: What `from_pretrained` returns with output_loading_info.

    Raises:
        StartupError: Tensors are missing, unexpected or of another shape; the text names them.
    """
    shapes = [f"{key} {list(a)} for {list(b)}" for key, a, b in info["mismatched_keys"]]
    found = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
    faults = [f"{what}: {_some(keys)}" for what, keys in found.items() if keys]
    faults += [f"misshapen: {_some(shapes)}"] if shapes else []
    if faults:
        raise _misfit(directory, [f"are not those of {name}", *faults], info["unexpected_keys"])


def _draft_layers(config: Any) -> re.Pattern[str]:
    """Match the names of multi-token prediction (MTP) layers, which transformers leaves out."""
    first, count = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", 0) or 0
    numbers = "|".join(str(first + i) for i in range(count)) or "none"
    return re.compile(rf"(^|\.)mtp\b|\blayers\.({numbers})\.")


def _misfit(directory: Path, faults: list[str], names: Any) -> StartupError:
    is_foreign = any(name.startswith(FOREIGN_PREFIXES) for name in names)
    hint = f"; coconut-serve convert {directory} DST may know their layout" if is_foreign else ""
    return StartupError(f"the weights of {directory} {'; '.join(faults)}{hint}", param="MODEL")


def _some(names: Any) -> str:
    shown = sorted(names)[:_NUM_SHOWN]
    num_more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {num_more} more" if num_more else "")


@contextlib.contextmanager
def _reports() -> Iterator[list[str]]:
    """Keep the loader's progress bar and tables off the terminal; yields the tables."""
    tables: list[str] = []

    def take(record: logging.LogRecord) -> bool:
        tables.append(re.sub(r"\x1b\[\d*m", "", record.getMessage()))
        return False

    source = logging.getLogger("transformers.modeling_utils")
    has_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    source.addFilter(take)
    try:
        yield tables
    finally:
        source.removeFilter(take)
        if has_bar:
            transformers_logging.enable_progress_bar()
