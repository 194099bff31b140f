"""The native engine's reasoning step; vLLM samples answers itself and calls Decider directly."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from coconut_serve.reasoning import report
from coconut_serve.reasoning.adapters import AdapterBank
from coconut_serve.reasoning.decide import Decider
from coconut_serve.reasoning.embedding import Embedding
from coconut_serve.reasoning.mode import ProjectLogits
from coconut_serve.reasoning.plan import RowPlan
from coconut_serve.reasoning.progress import RowResult
from coconut_serve.reasoning.rows import StepRows
from coconut_serve.reasoning.sampling import AnswerSampler, TokenSampler
from coconut_serve.reasoning.settings import Admission
from coconut_serve.reasoning.slots import Slots


class ReasoningStep:
    """Samples, decides and reports for all rows of a step, with one packed copy to the host.

    Args:
        slots: The engine's slots.
        mode_names: Modes the model supports.
        vocab_size: Columns of the logits.
        embedding: The model's input embedding.
        adapters: Layers between hidden states and inputs.
        project_logits: The output head with its scaling and soft-caps.
    """

    def __init__(
        self,
        slots: Slots,
        mode_names: Iterable[str],
        *,
        vocab_size: int,
        embedding: Embedding,
        adapters: AdapterBank,
        project_logits: ProjectLogits,
    ) -> None:
        self._slots = slots
        self._decider = Decider(slots, mode_names, embedding=embedding, adapters=adapters)
        self._sampler = AnswerSampler(slots, vocab_size)
        self._thinking = TokenSampler(slots, "thinking")
        self._project_logits = project_logits

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Set up all slots that a step admits, in one upload."""
        if admissions:
            self._sampler.admit(admissions)

    def run(self, rows: list[RowPlan], hidden: Tensor, inputs: Tensor) -> list[RowResult]:
        """Decide the next input of each row, write it to the row's slot, report to the host.

        Args:
            rows: One plan for each row whose last known position was just computed.
            hidden: [num_rows, hidden_size], after the final norm.
            inputs: [num_rows, hidden_size], the inputs at these positions (for traces).

        Returns:
            One result for each row.
        """
        step = StepRows(rows, hidden, self._slots)
        self._sample(step)
        self._decider.decide(step)
        self._sampler.count(step.row_slots, step.host_slots, step.emitted)
        self._sampler.bad_words.record(step.row_slots, step.host_slots, step.token)
        host: list[list[float]] = report.pack(step, inputs).tolist()  # the step's one copy
        return [report.read(row.wanted, v) for row, v in zip(rows, host, strict=True)]

    def _sample(self, step: StepRows) -> None:
        """Compute logits for the rows that need them, and sample where a token is needed."""
        wanted = [i for i, row in enumerate(step.rows) if row.needs_logits]
        if not wanted:
            return
        raw = self._project_logits(step.select(step.hidden, wanted)).float()
        row_slots = step.select(step.row_slots, wanted)
        host_slots = tuple(step.rows[i].slot for i in wanted)
        step.set_logits(wanted, raw, self._sampler.adjust(raw, row_slots, host_slots))
        draws = [k for k, i in enumerate(wanted) if step.rows[i].needs_sampled]
        if not draws:
            return
        members = [wanted[k] for k in draws]
        logits = step.logits_of(members)
        drawn, is_bad = self._sampler.sample(
            logits, step.select(row_slots, draws), tuple(host_slots[k] for k in draws)
        )
        step.assign(step.sampled, members, drawn)
        step.assign(step.is_bad_sample, members, is_bad)
        step.draw_apart(self._thinking)
