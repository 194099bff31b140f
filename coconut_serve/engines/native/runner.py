"""Runs one step on the device: save, copy, admit, forward, decide."""

import torch
from torch import Tensor

from coconut_serve.engines.native.batch import BatchBuilder, ScoredRows, StepBatch
from coconut_serve.engines.native.model import PagedModel
from coconut_serve.engines.native.scheduler import Preemption, Schedule
from coconut_serve.engines.native.sequence import SavedState, Sequence
from coconut_serve.reasoning import report
from coconut_serve.reasoning.adapters import REALIGN, AdapterBank, build_realign
from coconut_serve.reasoning.progress import RowResult
from coconut_serve.reasoning.settings import Admission
from coconut_serve.reasoning.slots import Slots
from coconut_serve.reasoning.step import ReasoningStep

_SCORED_ROWS = 64  # prompt positions whose logits are in memory at once


class Runner:
    """Owns everything on the device but the weights; a new one is a fresh start.

    Beside keys and values each cache slot keeps the input vector of its position, so that
    preemption can replay fed vectors exactly.

    Args:
        model: The loaded model.
        mode_names: Modes to support.
        adapters: What the checkpoint has between hidden states and inputs.
        num_slots: Sequences that run at once.
        num_blocks: Blocks of the cache, the null block included.
        block_size: Positions of a block.
        max_model_len: Positions of a sequence.
    """

    def __init__(
        self,
        model: PagedModel,
        mode_names: tuple[str, ...],
        adapters: AdapterBank,
        *,
        num_slots: int,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._block_size = block_size
        num_cache_slots = num_blocks * block_size
        self._caches = model.make_caches(num_cache_slots)
        self._inputs = torch.empty(  # memory is committed as it is written, as for the caches
            num_cache_slots, model.hidden_size, dtype=model.dtype, device=model.device
        )
        self._slots = Slots(num_slots, model.hidden_size, dtype=model.dtype, device=model.device)
        self._step = ReasoningStep(
            self._slots,
            mode_names,
            vocab_size=model.vocab_size,
            embedding=model.embedding,
            adapters=adapters,
            project_logits=model.project_logits,
        )
        self._builder = BatchBuilder(
            num_slots=num_slots,
            max_model_len=max_model_len,
            block_size=block_size,
            caches=self._caches,
            device=model.device,
        )

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> list[RowResult]:
        """Execute a schedule; one result for each deciding row, in order."""
        for preemption in schedule.preemptions:
            preemption.sequence.saved = self._save(preemption)
        if schedule.block_copies:
            self._copy_blocks(schedule.block_copies)
        self._step.admit([self._admit(sequence) for sequence in schedule.admissions])
        if not schedule.rows:
            return []
        batch = self._builder.build(schedule)
        inputs = self._embed(batch)
        self._inputs.index_copy_(0, batch.plan.write_slots, inputs)
        hidden = self._model.forward(inputs, batch.positions, batch.plan, batch.is_long)
        for scored in batch.scored:
            self._score(scored, hidden)
        return self._decide(batch, inputs, hidden)

    def _score(self, scored: ScoredRows, hidden: Tensor) -> None:
        """Add the log-probabilities of prompt tokens to their sequence: a copy of their own."""
        num_top = scored.sequence.request.sampling.num_prompt_logprobs or 0
        for start in range(0, len(scored.next_ids), _SCORED_ROWS):
            ids = scored.next_ids[start : start + _SCORED_ROWS]
            first = scored.first_row + start
            logits = self._model.project_logits(hidden[first : first + len(ids)])
            scored.sequence.prompt_logprobs += report.score(logits.float(), ids, num_top)

    def _embed(self, batch: StepBatch) -> Tensor:
        """Build the inputs of all rows: ids, replayed vectors, slots; [num_rows, hidden_size]."""
        pending = self._slots.embed(self._model.embed_tokens, batch.pending_slots)
        if batch.is_pure_decode:
            return pending
        inputs = self._model.embed_tokens(batch.token_ids)
        if batch.replay_rows is not None and batch.replay_vectors is not None:
            inputs = inputs.index_copy(0, batch.replay_rows, batch.replay_vectors)
        return inputs.index_copy(0, batch.pending_rows, pending)

    def _decide(self, batch: StepBatch, inputs: Tensor, hidden: Tensor) -> list[RowResult]:
        if not batch.deciding:
            return []
        rows = []
        for sequence in batch.deciding:
            assert sequence.slot is not None
            rows.append(sequence.progress.plan(sequence.slot))
        if not batch.is_pure_decode:
            hidden, inputs = hidden[batch.pending_rows], inputs[batch.pending_rows]
        return self._step.run(rows, hidden, inputs)

    def _admit(self, sequence: Sequence) -> Admission:
        """Describe the new content of a slot, restored if the sequence was preempted."""
        assert sequence.slot is not None
        if sequence.request.reasoning.adapter == REALIGN and REALIGN not in self._adapters.names:
            model = self._model
            ids = torch.arange(model.vocab_size, device=model.device)
            norm = model.embedding.mean_norm(ids)
            self._adapters.add(REALIGN, build_realign(model.vocabulary(), norm))
        saved, sequence.saved = sequence.saved, None
        sequence.replay = saved.vectors if saved else None
        self._builder.admit(sequence.slot)
        snapshot = saved.snapshot if saved else None
        return Admission.read(sequence.slot, sequence.request, snapshot)

    def _save(self, preemption: Preemption) -> SavedState:
        """Save what rebuilds a sequence: its slot and the vectors fed so far."""
        sequence = preemption.sequence
        positions = [p for p, token in enumerate(sequence.inputs[:-1]) if token is None]
        computed = [p for p in positions if p < preemption.num_computed]
        size = self._block_size
        at = [preemption.blocks[p // size] * size + p % size for p in computed]
        vectors = self._inputs[torch.tensor(at, dtype=torch.int64, device=self._inputs.device)]
        if len(computed) < len(positions):  # preempted again while it was being rebuilt
            assert sequence.replay is not None
            vectors = torch.cat([vectors, sequence.replay[len(computed) :]])
        sequence.replay = None
        return SavedState(self._slots.save(preemption.slot), vectors)

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        size = self._block_size
        for source, target in copies:
            a, b = (
                slice(source * size, (source + 1) * size),
                slice(target * size, (target + 1) * size),
            )
            for keys, values in self._caches:
                keys[b] = keys[a]
                values[b] = values[a]
            self._inputs[b] = self._inputs[a]
