"""Decides the next input of each row and writes it to the row's slot.

Both real engines share this code. It works on device tensors only and never waits for them.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from coconut_serve.reasoning import noise
from coconut_serve.reasoning.adapters import AdapterBank
from coconut_serve.reasoning.embedding import Embedding
from coconut_serve.reasoning.halting import Controller, View
from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision, load_mode, settle
from coconut_serve.reasoning.plan import RowPlan
from coconut_serve.reasoning.registry import properties_of
from coconut_serve.reasoning.rows import StepRows
from coconut_serve.reasoning.slots import Slots, upload
from coconut_serve.types import HaltReason

_VECTOR_TYPE = np.dtype("<f4")  # of replayed vectors


class Decider:
    """Decides for all rows of a batch, in any mix of modes, from given logits and samples.

    Args:
        slots: The engine's slots.
        mode_names: Modes the model supports.
        embedding: The model's input embedding.
        adapters: Layers between hidden states and inputs.
    """

    def __init__(
        self,
        slots: Slots,
        mode_names: Iterable[str],
        *,
        embedding: Embedding,
        adapters: AdapterBank,
    ) -> None:
        self._slots = slots
        self._modes: dict[str, ReasoningMode] = {n: load_mode(n)(slots) for n in mode_names}
        self._controller = Controller(slots)
        self._embedding = embedding
        self._adapters = adapters
        self._pending_halt = slots.register("pending_halt", torch.int64)  # if keeps_last

    def decide(self, step: StepRows) -> None:
        """Decide the next input of each row and write it to the row's slot.

        Args:
            step: Holds the logits and sampled tokens of the rows that need them.
        """
        slots, rows = self._slots, step.row_slots
        host, settings = slots.host(step.host_slots), slots.settings(rows)
        is_thinking = slots.is_thinking[rows]
        has_steps = slots.steps_left[rows] > 0
        groups: dict[tuple[str, bool], list[int]] = {}
        for i, row in enumerate(step.rows):
            if row.asks_mode:
                groups.setdefault((row.mode, row.thinks_on_logits), []).append(i)
        modes = [self._modes[name] for name, _ in groups]
        contexts = [self._context(step, m, has_logits=has) for (_, has), m in groups.items()]
        decisions = [mode.decide(ctx) for mode, ctx in zip(modes, contexts, strict=True)]
        vectors = settle([decision.vector for decision in decisions], self._embedding.mean)
        for each in zip(modes, groups.values(), contexts, decisions, vectors, strict=True):
            self._assign(step, *each)
        if host.keeps_last.any():
            self._delay_halt(step)
        self._replay(step)
        step.halt = torch.where(is_thinking & ~has_steps, int(HaltReason.CAP), step.halt)
        step.halt = torch.where(is_thinking, step.halt, 0)
        step.thinks = is_thinking & (step.halt == 0)
        step.is_switch &= step.thinks
        if (host.final_token_ids >= 0).any():
            self._force_final(step)
        has_forced = slots.forced_left[rows] > 0
        step.is_forced = ~step.thinks & has_forced
        is_last = (step.halt > 0) & step.is_forced  # the first end token is fed next
        if host.end_adds_vector.any():
            self._add_end(step, is_last & settings.end_adds_vector & step.is_vector)
        feeds = step.thinks | step.adds_end
        if host.in_answer.any():
            feeds |= settings.in_answer & ~step.is_forced
        step.is_vector &= feeds
        token = torch.where(step.thinks, step.text, step.answer)
        step.token = torch.where(step.is_forced, slots.forced[rows, 0], token)
        is_bad = torch.where(step.is_vector, step.is_bad_vector, step.is_bad_sample)
        step.halt = torch.where(is_bad & ~step.is_forced, int(HaltReason.NUMERICAL), step.halt)
        self._write(step)

    def _force_final(self, step: StepRows) -> None:
        """Queue final_token_ids instead of the end tokens in rows whose switches are spent."""
        slots, rows = self._slots, step.row_slots
        final = slots.settings(rows).final_token_ids
        count = (final >= 0).sum(1)
        swaps = (step.halt == int(HaltReason.SWITCHES)) & (count > 0)
        slots.forced[rows] = torch.where(swaps.unsqueeze(1), final, slots.forced[rows])
        slots.forced_left[rows] = torch.where(swaps, count, slots.forced_left[rows])

    def _delay_halt(self, step: StepRows) -> None:
        """Halt rows that keep the last vector one step after their rule held."""
        rows = step.row_slots
        keeps, pending = self._slots.settings(rows).keeps_last, self._pending_halt[rows]
        self._pending_halt[rows] = torch.where(keeps & (pending == 0), step.halt, 0)
        step.halt = torch.where(keeps, pending, step.halt)

    def _add_end(self, step: StepRows, adds: Tensor) -> None:
        """Add the first end token's embedding to the last vector, where `adds`."""
        end = self._embedding(self._slots.forced[step.row_slots, 0].clamp_min(0))
        whole = (step.vector.float() + end.float()).to(step.vector.dtype)
        step.vector = torch.where(adds.unsqueeze(1), whole, step.vector)
        step.adds_end = adds

    def _context(self, step: StepRows, members: list[int], *, has_logits: bool) -> StepContext:
        logits, raw_logits = step.both_logits_of(members) if has_logits else (None, None)
        return StepContext(
            slots=self._slots,
            row_slots=step.select(step.row_slots, members),
            host_slots=tuple(step.rows[i].slot for i in members),
            hidden=step.select(step.hidden, members),
            logits=logits,
            raw_logits=raw_logits,
            sampled=step.select(step.sampled, members),
            embedding=self._embedding,
            adapters=self._adapters,
            has_trace=any(step.rows[i].wanted.trace_top_k is not None for i in members),
        )

    def _assign(
        self,
        step: StepRows,
        mode: ReasoningMode,
        members: list[int],
        ctx: StepContext,
        decision: StepDecision,
        vector: Tensor | None,
    ) -> None:
        """Check the halting rules and store the decision about a mode's rows in the step."""
        step.assign(step.text, members, decision.token)
        halt = self._halt(mode, ctx, decision.token, vector)
        if decision.halt is not None:
            halt = decision.halt if halt is None else torch.where(halt == 0, decision.halt, halt)
        if halt is not None:
            step.assign(step.halt, members, halt)
        if decision.is_switch is not None:
            step.assign(step.is_switch, members, decision.is_switch)
        if decision.retained_mass is not None:
            step.assign(step.retained_mass, members, decision.retained_mass)
        if vector is not None:
            step.assign_vectors(members, self._add_noise(ctx, vector), decision.is_vector)

    def _replay(self, step: StepRows) -> None:
        """Feed replayed vectors to the rows that have some left; such rows do not halt."""
        given = {
            i: fed
            for i, row in enumerate(step.rows)
            if row.may_think and (fed := self._replayed(row)) is not None
        }
        if not given:
            return
        members, device = list(given), step.hidden.device
        vectors = torch.from_numpy(np.stack([vector for vector, _ in given.values()]))
        if device.type != "cpu":
            vectors = vectors.pin_memory().to(device, non_blocking=True)
        step.assign_vectors(members, vectors)
        step.assign(step.text, members, upload([text for _, text in given.values()], device))
        step.assign(step.halt, members, torch.zeros_like(step.halt[: len(members)]))

    def _replayed(self, row: RowPlan) -> tuple[np.ndarray, int] | None:
        """Return the vector that this step replays, and its text; None if there is none."""
        params, size = self._slots.admitted[row.slot].reasoning, self._slots.hidden_size
        at = row.num_steps * size
        if at * _VECTOR_TYPE.itemsize >= len(params.replay_vectors):
            return None
        vector = np.frombuffer(params.replay_vectors, _VECTOR_TYPE)[at : at + size]
        return vector, params.replay_token_ids[row.num_steps] if params.replay_token_ids else -1

    def _halt(
        self, mode: ReasoningMode, ctx: StepContext, token: Tensor, vector: Tensor | None
    ) -> Tensor | None:
        """Check the rules that are active in these rows."""
        view = View(
            slots=self._slots,
            row_slots=ctx.row_slots,
            logits=ctx.logits,
            raw_logits=ctx.raw_logits,
            token=token,
            has_text=properties_of(mode.name).has_text,
            vector=vector,
            is_tempered=mode.is_tempered,
        )
        return self._controller.check(view, ctx.host_slots)

    def _add_noise(self, ctx: StepContext, vector: Tensor) -> Tensor:
        """Add Gaussian noise where `noise_std` asks (LatentTTS, Soft Tokens 2509.19170)."""
        if not ctx.host.noise_std.any():
            return vector
        columns = torch.arange(vector.shape[1], device=vector.device).unsqueeze(0)
        rows, slots = ctx.row_slots, self._slots
        drawn = noise.normal(
            slots.seed[rows], slots.num_decisions[rows], noise.VECTOR_STREAM, columns
        )
        return vector.float() + ctx.settings.noise_std.unsqueeze(1) * drawn

    def _write(self, step: StepRows) -> None:
        """Write the next input and the counters of every row."""
        slots, rows = self._slots, step.row_slots
        slots.token[rows] = step.token.clamp_min(0)
        slots.is_vector[rows] = step.is_vector
        slots.vector[rows] = step.vector
        slots.is_thinking[rows] = step.thinks
        slots.steps_left[rows] -= step.thinks.to(torch.int64)
        slots.num_decisions[rows] += 1
        slots.num_output_tokens[rows] += (~step.thinks & ~step.is_forced).to(torch.int64)
        rolled = slots.forced[rows].roll(-1, dims=1)
        slots.forced[rows] = torch.where(step.is_forced.unsqueeze(1), rolled, slots.forced[rows])
        slots.forced_left[rows] -= step.is_forced.to(torch.int64)
        if (slots.host(step.host_slots).enter_token_id >= 0).any():
            enter = slots.settings(rows).enter_token_id
            is_said = ~step.thinks & ~step.is_forced & (step.token == enter)
            opens = is_said & (slots.blocks_left[rows] > 0)
            slots.open_blocks(rows, opens)
            self._controller.restart(rows, opens)
