"""Extends vLLM's Model Runner V2: a mixin for its model state and one for its sampler.

vLLM picks a model state for each architecture; ours is that class with ReasoningStateMixin in
front, so no architecture needs a class of its own. The sampler stays vLLM's: tokens of rows that
think are replaced after it has sampled and before it gathers log-probabilities.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.triton_utils import HAS_TRITON
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

from coconut_serve.checkpoint.manifest import load_manifest
from coconut_serve.engines.vllm.params import Thinking, from_extra_args
from coconut_serve.engines.vllm.worker import Decided, WorkerReasoning, WorkerRow
from coconut_serve.reasoning.adapters import REALIGN, AdapterBank, build_realign
from coconut_serve.reasoning.embedding import ROWS_AT_ONCE, Embedding
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.reasoning.sampling import apply_changes, min_tokens_changes
from coconut_serve.reasoning.slots import EmbedTokens, upload

_LORA_LAYER = "VocabParallelEmbeddingWithLoRA"
_REFUSED = (
    ("speculative_config", None, "speculative decoding: drafts cannot follow a vector"),
    ("kv_transfer_config", None, "KV transfer: blocks that hold thoughts would move under ids"),
    ("watermark_config", None, "watermarking: thoughts have no tokens to mark"),
    ("parallel_config.pipeline_parallel_size", 1, "pipeline parallelism: hidden states are on the "
     "last rank, embeddings on the first; use tensor or data parallelism"),
    ("parallel_config.prefill_context_parallel_size", 1, "prefill context parallelism"),
    ("parallel_config.enable_batch_sharded_sampling", None, "batch-sharded sampling"),
    ("parallel_config.enable_dbo", False, "dual batch overlap"),
)  # fmt: skip


def check_config(config: Any) -> None:
    """Reject settings of vLLM that reasoning cannot work with.

    Args:
        config: vLLM's VllmConfig.

    Raises:
        ValueError: Naming what is in the way.
    """
    for path, allowed, reason in _REFUSED:
        value = config
        for name in path.split("."):
            value = getattr(value, name, allowed)
        if value != allowed and value:
            raise ValueError(f"coconut-serve does not work with {reason}")
    _check_rotary(config.model_config)
    if not (HAS_TRITON and config.use_v2_model_runner):
        raise ValueError(
            "coconut-serve needs vLLM's Model Runner V2, which needs Triton and so a GPU; "
            "--engine native serves the same modes without one"
        )
    if not config.model_config.enable_prompt_embeds:
        raise ValueError("coconut-serve needs --enable-prompt-embeds")
    checks = [str(p) for p in config.model_config.logits_processors or ()]
    if not any("ReasoningParamsCheck" in check for check in checks):
        raise ValueError(
            "coconut-serve needs --logits-processors "
            "coconut_serve.engines.vllm.params:ReasoningParamsCheck"
        )


def _check_rotary(model: Any) -> None:
    """Reject rotary factors that depend on length: vLLM uses its longest length's for all rows.

    Raises:
        ValueError: Naming the type.
    """
    text_config = getattr(model, "hf_text_config", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else (rope,)
    for kind in kinds:
        name, original = kind.get("rope_type"), kind.get("original_max_position_embeddings")
        if name == "dynamic":
            raise ValueError("coconut-serve does not work with rope_type dynamic in vLLM")
        if name == "longrope" and original and model.max_model_len > original:
            raise ValueError(
                f"vLLM takes LongRoPE's long factors for sequences of any length, where the model "
                f"has short ones up to {original}: give --max-model-len {original}, or use "
                "--engine native, which takes each sequence's own"
            )


class ReasoningStateMixin:
    """Feeds vectors, keeps the slots, and hands the sampler what it needs."""

    def __init__(
        self, vllm_config: Any, model: nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        check_config(vllm_config)
        name = type(model).__name__
        if getattr(model, "requires_raw_input_tokens", False):
            raise ValueError(f"coconut-serve does not work with {name}: it needs token ids")
        super().__init__(vllm_config, model, encoder_cache, device)  # type: ignore[call-arg]
        config = vllm_config.model_config
        vocab_size = config.get_vocab_size()
        self._model = model
        self._adapted: list[nn.Module] | None = None  # embedding layers that LoRA wraps
        embedding = _embedding(model, self._embed)
        self.adapters = _load_adapters(config.model, device)
        self.adapters.check(config.get_inputs_embeds_size())
        _add_realign(self.adapters, model, embedding, torch.arange(vocab_size, device=device))
        self.reasoning = WorkerReasoning(
            num_slots=vllm_config.scheduler_config.max_num_seqs,
            hidden_size=config.get_inputs_embeds_size(),
            modes=mode_names(),
            embedding=embedding,
            adapters=self.adapters,
            vocab_size=vocab_size,
            dtype=config.dtype,
            device=device,
        )
        self._vocab_size = vocab_size
        self._has_lora = vllm_config.lora_config is not None
        self.captured: Tensor | None = None  # input of the output head
        self.skipped: set[int] = set()  # rows of the next batch whose logits nothing reads
        self.needs_no_sample = False  # whether none of its rows needs a sample
        self.inputs: Tensor | None = None  # [num_rows, hidden_size], the last input of each row
        self._compute_logits = model.compute_logits
        model.compute_logits = self._capture  # type: ignore[assignment]  # on the instance

    def _capture(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep the output head's input; it is a gathered copy, safe from graph replays.

        Rows whose logits nothing reads get zeros: the head is a large part of a small model.
        LoRA's layers need the whole batch.
        """
        self.captured = hidden
        skipped, self.skipped = self.skipped, set()
        if not skipped or self._has_lora:
            return self._compute_logits(hidden, *args, **kwargs)  # type: ignore[operator]
        wanted = [i for i in range(len(hidden)) if i not in skipped]
        if not wanted:
            return hidden.new_zeros(len(hidden), self._vocab_size)
        rows = upload(wanted, hidden.device)
        part = self._compute_logits(hidden[rows], *args, **kwargs)  # type: ignore[operator]
        return part.new_zeros(len(hidden), part.shape[1]).index_copy_(0, rows, part)

    def _embed(self, ids: Tensor) -> Tensor:
        """Call the model's embedding; [...] int64 -> [..., hidden_size]."""
        if self._adapted is None:
            self._adapted = [m for m in self._model.modules() if type(m).__name__ == _LORA_LAYER]
        with _without_adapters(self._adapted):
            rows = self._model.embed_input_ids(ids.flatten())  # type: ignore[operator]
        return rows.view(*ids.shape, -1)  # type: ignore[no-any-return]

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Set up a slot for a request that thinks."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        sampling = new_req_data.sampling_params
        thinking = read_thinking(sampling)
        if thinking is None or not new_req_data.prefill_token_ids:
            return
        counts = self.reasoning.add(
            req_index,
            new_req_data.req_id,
            thinking,
            num_prompt=new_req_data.prompt_len,
            prefill_token_ids=new_req_data.prefill_token_ids,
            has_penalties=_has_penalties(sampling),
        )
        if counts is not None:
            self._sampler.restored.append((req_index, counts))

    def forget(self, request_ids: set[str]) -> None:
        """Drop requests that ended, before vLLM removes ended and preempted ones alike."""
        self.reasoning.forget(request_ids)

    def remove_request(self, req_id: str) -> None:
        """Save what a preempted request needs to resume."""
        super().remove_request(req_id)  # type: ignore[misc]
        slot = self.reasoning.slot_of(req_id)
        if slot is not None:
            penalties = self._sampler.penalties_state
            has_penalties = bool(penalties.use_penalty[slot])
            self.reasoning.remove(req_id, penalties.output_bin_counts if has_penalties else None)

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: Any, input_batch: Any, req_states: Any
    ) -> Tensor:
        """Embed the tokens, then overwrite placeholders with the fed vectors."""
        embeds: Tensor = super().prepare_inputs_embeds(  # type: ignore[misc]
            scheduled_encoder_inputs, input_batch, req_states
        )
        self.reasoning.overlay(embeds, input_batch)
        slots, positions = input_batch.idx_mapping_np, input_batch.seq_lens_cpu_upper_bound.numpy()
        settled, skipped = self.reasoning.skippable_rows(slots, positions)
        self.needs_no_sample, self.skipped = 0 < len(settled) == len(slots), set(skipped)
        self.inputs = None
        if self.reasoning.wants_inputs(input_batch.idx_mapping_np):
            self.inputs = embeds[input_batch.logits_indices]  # layers may overwrite `embeds`
        return embeds

    def custom_sampler(self, sampler: Any) -> None:
        """Mix our methods into vLLM's own sampler, and keep it."""
        if super().custom_sampler(sampler) is not None:  # type: ignore[misc]
            raise ValueError("coconut-serve does not work with models that bring a sampler")
        kind = type(sampler)
        sampler.__class__ = type(f"Reasoning{kind.__name__}", (ReasoningSamplerMixin, kind), {})
        sampler.state, sampler.decided, sampler.restored = self, None, []
        self._sampler = sampler

    def postprocess_state(
        self, idx_mapping: Tensor, num_sampled: Tensor, num_computed_tokens: Tensor | None = None
    ) -> None:
        """Remove tokens that the model did not emit from the penalty counts."""
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)  # type: ignore[misc]
        decided, self._sampler.decided = self._sampler.decided, None
        if decided is not None:
            self._sampler.uncount(decided)


class ReasoningSamplerMixin:
    """Replaces the tokens of rows that think, between sampling and log-probabilities."""

    state: ReasoningStateMixin
    decided: tuple[Decided, Tensor] | None  # of the running step, and the tokens vLLM sees
    restored: list[tuple[int, Tensor]]  # penalty counts to restore: slot, [vocab_size]

    def apply_staged_writes(self) -> None:
        """Restore penalty counts after vLLM has counted the outputs of resumed requests."""
        super().apply_staged_writes()  # type: ignore[misc]
        for slot, counts in self.restored:
            self.penalties_state.output_bin_counts[slot] = counts  # type: ignore[attr-defined]
        self.restored.clear()

    def get_logprobs_dims(
        self, idx_mapping_np: np.ndarray, include_token_ids: bool = True
    ) -> tuple[int, int] | None:
        """Gather no log-probabilities where the step report takes their place."""
        rows = self.state.reasoning.rows
        if rows and any(
            row is not None and row.thinking.report_width
            for row in map(rows.get, idx_mapping_np.tolist())
        ):
            return None
        return super().get_logprobs_dims(  # type: ignore[misc,no-any-return]
            idx_mapping_np, include_token_ids
        )

    def __call__(self, logits: Tensor, input_batch: Any) -> Any:
        """Sample, and send the report as if it were log-probabilities."""
        output = super().__call__(logits, input_batch)  # type: ignore[misc]
        if self.decided is None:
            return output
        num_rows = input_batch.logits_indices.shape[0]
        packed = self.state.reasoning.pack(self.decided[0], self.state.inputs, num_rows)
        if packed is not None:
            # Distinct ids: where vLLM joins chunks, it keeps one value for each id.
            columns = torch.arange(packed.shape[1], dtype=torch.int32, device=packed.device)
            output.logprobs_tensors = LogprobsTensors(
                logprob_token_ids=columns.expand_as(packed),
                logprobs=packed,
                selected_token_ranks=packed.new_zeros(packed.shape[0], dtype=torch.int64),
            )
        return output

    def sample(
        self,
        logits: Tensor,
        expanded_idx_mapping: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        pos: Tensor,
        input_ids: Tensor,
        expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        return_logprobs: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Sample as vLLM does, then let the modes decide for the rows that think."""
        state, hidden = self.state, self.state.captured
        state.captured = None
        found = state.reasoning.deciding(idx_mapping_np, seq_lens_upper_bound_np)
        context = LogitsContext(
            expanded_idx_mapping=expanded_idx_mapping,
            idx_mapping=idx_mapping,
            idx_mapping_np=idx_mapping_np,
            expanded_local_pos=expanded_local_pos,
            input_ids=input_ids,
            pos=pos,
            seq_lens_upper_bound_np=seq_lens_upper_bound_np,
        )
        allowed = self._forbid_stops(logits, found, idx_mapping)
        if state.needs_no_sample:  # no row needs a sample
            sampled, processed = logits.new_zeros(len(logits), dtype=torch.int64), allowed
        else:
            sampled, processed = super().sample(  # type: ignore[misc]
                allowed,
                expanded_idx_mapping,
                idx_mapping,
                idx_mapping_np,
                pos,
                input_ids,
                expanded_local_pos,
                seq_lens_upper_bound_np,
                return_logprobs=return_logprobs,
            )
        state.reasoning.track_end_tokens(idx_mapping_np, seq_lens_upper_bound_np, sampled)
        if not found or hidden is None:
            return sampled, processed
        decided = state.reasoning.decide(
            found,
            hidden=hidden,
            logits=logits,
            adjusted=self._adjust(allowed, found, context),
            sampled=sampled,
        )
        self.decided = (decided, sampled)
        return sampled, processed

    def _forbid_stops(
        self, logits: Tensor, found: list[tuple[int, int, WorkerRow, int]], idx_mapping: Tensor
    ) -> Tensor:
        """Apply min_tokens to rows for which vLLM does not."""
        changes = [
            change
            for i, _, row, _ in found
            for change in min_tokens_changes(
                i, row.thinking.answer_stop_token_ids, row.thinking.min_tokens
            )
        ]
        return apply_changes(logits, changes, self.state.reasoning.slots, idx_mapping)

    def _adjust(
        self, logits: Tensor, found: list[tuple[int, int, WorkerRow, int]], context: LogitsContext
    ) -> Tensor:
        """Apply penalties and biases for the modes that read logits, if a row has any."""
        needs: np.ndarray = self.needs_logits_processing  # type: ignore[attr-defined]
        if not any(needs[slot] and row.plan(slot, j).needs_logits for _, slot, row, j in found):
            return logits
        changed = torch.empty_like(logits, dtype=torch.float32).copy_(logits)
        for processor in self.logits_processors:  # type: ignore[attr-defined]
            changed = processor.apply(changed, context)
        return changed

    def uncount(self, decided: tuple[Decided, Tensor]) -> None:
        """Undo the penalty counts of hidden and forced tokens of this step."""
        penalties = self.penalties_state  # type: ignore[attr-defined]
        rows, sampled = decided
        if not penalties.use_penalty[rows.slots].any():
            return
        step = rows.step
        token = sampled[upload(rows.members, sampled.device)].long()
        is_silent = (step.emitted < 0).to(torch.int32)
        counts = penalties.output_bin_counts
        counts.index_put_((step.row_slots, token), -is_silent, accumulate=True)


def read_thinking(sampling: Any) -> Thinking | None:
    """Parse the checked settings of a request; None if nothing but vLLM's own work is needed."""
    if sampling is None:
        return None
    thinking = from_extra_args(sampling.extra_args)
    if thinking is None:
        return None
    params = thinking.params
    thinks = params.num_forced > 0 or params.mixture.in_answer
    thinks |= params.steps > 0 and not thinking.passes_through
    return thinking if thinks or thinking.report_width or thinking.min_tokens else None


def _has_penalties(sampling: Any) -> bool:
    """Whether vLLM counts the tokens of a request."""
    is_neutral = sampling.presence_penalty == sampling.frequency_penalty == 0
    return not is_neutral or sampling.repetition_penalty != 1


def _load_adapters(model: str, device: torch.device) -> AdapterBank:
    """Load the manifest's adapters; every worker does."""
    manifest = load_manifest(Path(model))
    return AdapterBank.load(Path(model), manifest.adapter_specs if manifest else {}, device)


def _vocabulary(model: nn.Module) -> tuple[Any, Any]:
    """The layers of input embedding and output head, which may be the same; None if missing."""
    layers = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    heads = [m for m in layers if isinstance(m, ParallelLMHead)]
    return next(iter(layers), None), next(iter(heads + layers), None)


def _rows(layer: Any) -> Tensor | None:
    """This rank's rows of such a layer, without padding; None where they are quantised."""
    kinds = (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)
    if layer is None or not isinstance(layer.quant_method, kinds):
        return None
    rows: Tensor = layer.weight.data[: layer.shard_indices.num_org_elements]
    return rows


def _embedding(model: nn.Module, call: EmbedTokens) -> Embedding:
    """The input embedding with its table: this rank's part, where it is not quantised."""
    table, _ = _vocabulary(model)
    rows = _rows(table)
    if rows is None:
        return Embedding(call, None)
    first_id = table.shard_indices.org_vocab_start_index
    return Embedding(call, rows, first_id=first_id, reduce=_reduce(table))


def _reduce(layer: Any) -> Callable[[Tensor], Tensor] | None:
    """The sum over ranks that share a layer; None for a layer that is whole."""
    return tensor_model_parallel_all_reduce if layer.tp_size > 1 else None


def _add_realign(
    adapters: AdapterBank, model: nn.Module, embedding: Embedding, ids: Tensor
) -> None:
    """Build the training-free adapter, unless embedding or output head are quantised.

    At start, while the memory of the cache is still free; `ids` is the whole vocabulary.
    """
    table, head = _vocabulary(model)
    rows, head_rows = _rows(table), _rows(head)
    if rows is None or head_rows is None or head.shard_indices != table.shard_indices:
        return
    parts = zip(*(torch.split(t, ROWS_AT_ONCE) for t in (head_rows, rows)), strict=True)
    norm = embedding.mean_norm(ids)
    adapters.add(REALIGN, build_realign(parts, norm, _reduce(head)))


@contextlib.contextmanager
def _without_adapters(layers: list[Any]) -> Iterator[None]:
    """Embed with the base weights: a LoRA layer expects the batch that it was set up for.

    Adapters that change the embedding are rejected when the engine starts.
    """
    for layer in layers:
        layer.forward = layer.base_layer.forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
