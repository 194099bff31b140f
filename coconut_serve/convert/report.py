"""What became of every tensor."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Report:
    """Collects the fate of each tensor by name, and remarks for the user.

    Names are those of the checkpoint, except `used`, which are those written.
    """

    def __init__(self) -> None:
        self.format = ""
        self.notes: list[str] = []  # what was assumed, and what to know
        self.used: dict[str, str] = {}  # written tensor -> file it is in
        self.merged: dict[str, str] = {}  # tensor -> where it went
        self.dropped: dict[str, str] = {}  # tensor -> why
        self.missing: dict[str, str] = {}  # tensor of the architecture -> why that is fine
        self.accounted: set[int] = set()  # id() of tensors that were merged or dropped

    def note(self, text: str) -> None:
        """Remember a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def drop(self, tensors: Mapping[str, Tensor], why: str) -> None:
        """Remember that tensors are left out on purpose."""
        self.dropped |= dict.fromkeys(tensors, why)
        self.accounted |= {id(tensor) for tensor in tensors.values()}

    def merge(self, tensors: Mapping[str, Tensor], into: str) -> None:
        """Remember that tensors are written as part of another."""
        self.merged |= dict.fromkeys(tensors, into)
        self.accounted |= {id(tensor) for tensor in tensors.values()}

    def as_json(self) -> dict[str, Any]:
        """The whole report, for convert_report.json."""
        return {
            "format": self.format,
            "notes": self.notes,
            "used": self.used,
            "merged": self.merged,
            "dropped": self.dropped,
            "missing": self.missing,
        }

    def lines(self) -> list[str]:
        """The report for people: tensors that differ in a number only share a line."""
        lines = [f"format: {self.format}"]
        for fate in ("used", "merged", "dropped", "missing"):
            tensors: dict[str, str] = getattr(self, fate)
            counts = Counter(
                (re.sub(r"\.\d+\.", ".*.", name), re.sub(r"\.\d+\.", ".*.", why))
                for name, why in tensors.items()
            )
            lines.append(f"{fate}: {len(tensors)} tensors")
            lines += [f"  {count:4} x {name} ({why})" for (name, why), count in counts.items()]
        return lines + [f"note: {note}" for note in self.notes]
