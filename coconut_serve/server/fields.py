"""What becomes of request fields of OpenAI, vLLM, SGLang and llama.cpp that are not ours.

Supported fields are in the bodies of schemas.py. Here are those that do not affect an answer, and
those that would and are rejected. tests/server/test_drift.py keeps the three lists complete.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel

from coconut_serve.errors import InvalidRequestError

MAX_UNKNOWN = 64  # unknown fields of a body
_MAX_NAME = 64  # characters of a name that is compared with ours

# Accepted because clients send them, without effect: billing, routing, caching, transport, and
# options of images and audio, which messages cannot hold.
ACCEPTED = frozenset({
    # OpenAI
    "max_tool_calls", "metadata", "modalities", "parallel_tool_calls", "prediction",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user", "verbosity",
    # vLLM
    "media_io_kwargs", "mm_payload", "mm_processor_kwargs", "priority", "return_mm_kwargs",
    "return_token_offsets", "routed_experts_prompt_start", "session_id", "stream_interval",
    # SGLang
    "custom_labels", "data_parallel_rank", "disagg_prefill_dp_rank", "extra_key", "images_config",
    "max_dynamic_patch", "min_dynamic_patch", "ngram_corpus_id", "rid", "routed_dp_rank",
    "routed_experts_start_len", "use_audio_in_video",
    # llama.cpp; some of these only qualify a rejected field
    "cache_prompt", "dry_allowed_length", "dry_base", "dry_penalty_last_n",
    "dry_sequence_breakers", "dynatemp_exponent", "id_slot", "mirostat_eta", "mirostat_tau",
    "n_cache_reuse", "n_keep", "parse_tool_calls", "sse_ping_interval", "xtc_threshold",
    # OpenRouter
    "models", "plugins", "provider", "route", "transforms", "usage",
})  # fmt: skip
# Rejected, except with neutral values: a default that a client spells out.
REJECTED: Mapping[str, tuple[object, ...]] = {
    # OpenAI
    "access_programs": ({},), "audio": (), "background": (False,), "background_options": ({},),
    "best_of": (1,), "context_management": ([],), "conversation": (), "image": ({},),
    "previous_response_id": (), "function_call": (), "functions": (), "moderation": (),
    "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],), "web_search_options": (),
    # vLLM
    "cache_salt": ("",), "chat_template": (), "documents": ([],), "early_stopping": (False,),
    "ec_transfer_params": ({},), "guided_choice": (), "guided_decoding_backend": (),
    "guided_grammar": (), "guided_json": (), "guided_regex": (), "guided_whitespace_pattern": (),
    "kv_transfer_params": ({},), "length_penalty": (1,), "logprob_token_ids": ([],),
    "prompt_embeds": (), "prompt_logprobs": (), "repetition_detection": (),
    "return_prompt_text": (False,), "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,), "structured_outputs": (),
    "thinking_token_budget": (-1,), "truncation_side": ("left",), "use_beam_search": (False,),
    "vllm_xargs": ({},), "watermarking": (False,),
    # SGLang
    "bootstrap_host": (), "bootstrap_port": (), "bootstrap_room": (),
    "custom_logit_processor": (), "custom_params": ({},), "ebnf": (), "input_ids": (),
    "json_schema": (), "lora_path": (), "no_stop_trim": (False,), "regex": (),
    "return_cached_tokens_details": (False,), "return_hidden_states": (False,),
    "return_meta_info": (False,), "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,), "separate_reasoning": (True,), "session_params": ({},),
    "stop_regex": ([],), "stream_reasoning": (True,), "structural_tag": (), "task": (),
    # llama.cpp
    "dry_multiplier": (0,), "dynatemp_range": (0,), "generation_prompt": ("",),
    "grammar": ("",), "grammar_lazy": (False,), "grammar_triggers": ([],), "image_data": ([],),
    "lora": ([],), "min_keep": (0,), "mirostat": (0,), "n_cmpl": (1,), "n_indent": (0,),
    "n_predict": (), "n_probs": (0,), "penalize_nl": (False,), "post_sampling_probs": (False,),
    "preserved_tokens": ([],), "reasoning_budget": (-1,), "reasoning_budget_tokens": (-1,),
    "reasoning_control": (False,), "reasoning_format": ("auto", "deepseek"),
    "repeat_last_n": (-1,), "repeat_penalty": (1,), "response_fields": ([],),
    "return_progress": (False,), "return_tokens": (False,), "samplers": ([],),
    "t_max_predict_ms": (0,), "tfs_z": (1,), "timings_per_token": (False,), "top_n_sigma": (-1,),
    "typical_p": (1,), "xtc_probability": (0,),
    # Names of other APIs: transformers, TGI, Anthropic, Ollama, and what Python clients unpack
    "do_sample": (True,), "extra_body": ({},), "max_new_tokens": (), "max_tokens_to_sample": (),
    "no_repeat_ngram_size": (0,), "num_beams": (1,), "num_predict": (), "sampling_params": (),
    "stop_sequences": ([],), "top_n_tokens": (0,),
    # Other names for thinking
    "enable_thinking": (), "thinking": (), "thinking_budget": (), "thinking_budget_tokens": (-1,),
}  # fmt: skip
# What to send instead of a rejected field.
INSTEAD: Mapping[str, str] = {
    "conversation": "its items in input", "do_sample": "temperature",
    "enable_thinking": "reasoning_mode",
    "extra_body": "its fields beside the others", "input_ids": "prompt", "n_cmpl": "n",
    "max_new_tokens": "max_tokens", "max_tokens_to_sample": "max_tokens",
    "n_predict": "max_tokens", "num_predict": "max_tokens", "stop_sequences": "stop",
    "top_n_tokens": "top_logprobs", "n_probs": "logprobs",
    "previous_response_id": "the items of that response in input",
    "no_stop_trim": "include_stop_str_in_output",
    "reasoning_budget": "reasoning.steps", "reasoning_budget_tokens": "reasoning.steps",
    "repeat_penalty": "repetition_penalty", "return_prompt_token_ids": "return_token_ids",
    "return_tokens": "return_token_ids", "thinking": "reasoning_mode",
    "thinking_budget": "reasoning.steps", "thinking_budget_tokens": "reasoning.steps",
    "thinking_token_budget": "reasoning.steps",
}  # fmt: skip
_OURS = ("reasoning", "latent", "latents", "thinking", "think")  # never harmless in a name


@dataclass(frozen=True, slots=True)
class Path:
    """A field by its path in a body, with the spellings a client may use."""

    path: str
    spellings: tuple[str, ...] = field(init=False)
    letters: tuple[Counter[str], ...] = field(init=False)

    def __post_init__(self) -> None:
        """Derive the ends of the path: mixture.top_k is also spelt mixture_top_k and top_k."""
        parts = self.path.split(".")
        ends = tuple(_squeeze("".join(parts[i:])) for i in range(len(parts)))
        object.__setattr__(self, "spellings", ends)
        object.__setattr__(self, "letters", tuple(map(Counter, ends)))


@functools.cache
def paths_of(kind: type[BaseModel]) -> tuple[Path, ...]:
    """All fields of a body at any level, but `type`."""
    found = _walk(kind, "")
    return tuple(Path(path) for path in found if not path.startswith("response_format."))


def _walk(kind: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, declared in kind.model_fields.items():
        yield prefix + name
        for part in (declared.annotation, *get_args(declared.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _walk(part, f"{prefix}{name}.")


def nearest(name: str, paths: Iterable[Path]) -> str | None:
    """The field that a path misspells, or puts at the wrong level; None if none is close.

    Args:
        name: An unknown dotted path.
        paths: The fields; among equally close ones those at the same level come first.
    """
    parent, _, own = name.rpartition(".")
    squeezed = _squeeze(own)
    letters, limit = Counter(squeezed), min(3, (len(squeezed) - 1) // 4)
    limit = max(limit, 1 if parent else 0)  # an unknown name inside an object of ours is an error
    found: list[tuple[int, bool, int, str]] = []
    for index, each in enumerate(paths):
        if "replay." in each.path and "replay." not in name:
            continue  # nobody writes those by hand
        for spelt, known in zip(each.spellings, each.letters, strict=True):
            # Each slip loses one letter at most: a cheap test before the distance.
            if abs(len(spelt) - len(squeezed)) > limit or (known - letters).total() > limit:
                continue
            distance = _distance(squeezed, spelt)
            if distance <= limit:
                is_elsewhere = not each.path.startswith(parent)
                found.append((distance, is_elsewhere, index, each.path))
    return min(found)[3] if found else None


def _squeeze(name: str) -> str:
    """Remove what spellings differ in: topK, top-k and top_k become one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _distance(a: str, b: str) -> int:
    """Letters inserted, deleted, replaced or swapped between words (Damerau-Levenshtein, OSA)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and (x, y) == (b[j - 2], a[i - 2]):
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]


def unknown_error(name: str, paths: Sequence[Path]) -> InvalidRequestError:
    """The error for an unknown field, with the field it may mean."""
    near = nearest(name, paths)
    return InvalidRequestError(
        f"unknown field {name!r}" + (f"; did you mean {near!r}?" if near else ""),
        param=name,
        code="unknown_parameter",
    )


def ignored_fields(body: BaseModel, others: frozenset[str]) -> list[str]:
    """Name the unknown fields; reject those that must not be ignored.

    Args:
        body: The parsed body; its reasoning object is checked elsewhere.
        others: Fields of the other endpoint of its kind.

    Raises:
        InvalidRequestError: A field is known but not supported, or misspells one of ours.
    """
    ignored: list[str] = []
    paths = paths_of(type(body))
    for name, value in _extras(body):
        if value is None or name in ACCEPTED:
            continue
        if name in REJECTED or name in others:
            if any(value == neutral for neutral in REJECTED.get(name, (False, [], {}))):
                continue
            instead = f"; send {INSTEAD[name]!r}" if name in INSTEAD else ""
            raise InvalidRequestError(
                f"{name} is not supported here{instead}", param=name, code="unsupported_parameter"
            )
        if len(ignored) == MAX_UNKNOWN:
            raise InvalidRequestError(f"more than {MAX_UNKNOWN} unknown fields", param=name)
        is_like = len(name) <= _MAX_NAME
        if is_like and (nearest(name, paths) or any(map(_is_ours, name.split("_")))):
            raise unknown_error(name, paths)
        ignored.append(name)
    return ignored


def _extras(body: BaseModel) -> Iterator[tuple[str, Any]]:
    """Undeclared fields of a body and of the objects in it."""
    yield from (body.model_extra or {}).items()
    for name in type(body).model_fields:
        part = getattr(body, name)
        if isinstance(part, BaseModel) and name != "reasoning":
            yield from ((f"{name}.{key}", value) for key, value in (part.model_extra or {}).items())


def _is_ours(word: str) -> bool:
    limit = 1 if len(word) > 6 else 0
    alike = [ours for ours in _OURS if abs(len(ours) - len(word)) <= limit]
    return any(_distance(word.lower(), ours) <= limit for ours in alike)
