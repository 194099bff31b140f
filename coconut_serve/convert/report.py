"""The conversion report: what happened to each tensor."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Report:
    """Collects the fate of each tensor and notes for the user.

    Names are the checkpoint's, except in `used`, which has the written names.
    """

    def __init__(self) -> None:
        self.format = ""
        self.notes: list[str] = []  # assumptions and hints
        self.used: dict[str, str] = {}  # written tensor -> its file
        self.merged: dict[str, str] = {}  # tensor -> where it went
        self.dropped: dict[str, str] = {}  # tensor -> why
        self.missing: dict[str, str] = {}  # tensor of the architecture -> why it may be absent
        self.accounted: set[int] = set()  # id() of tensors that were merged or dropped

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def drop(self, tensors: Mapping[str, Tensor], why: str) -> None:
        """Record tensors left out on purpose."""
        self.dropped |= dict.fromkeys(tensors, why)
        self.accounted |= {id(tensor) for tensor in tensors.values()}

    def merge(self, tensors: Mapping[str, Tensor], into: str) -> None:
        """Record tensors written as part of another."""
        self.merged |= dict.fromkeys(tensors, into)
        self.accounted |= {id(tensor) for tensor in tensors.values()}

    def as_json(self) -> dict[str, Any]:
        """Return the contents of convert_report.json."""
        return {
            "format": self.format,
            "notes": self.notes,
            "used": self.used,
            "merged": self.merged,
            "dropped": self.dropped,
            "missing": self.missing,
        }

    def lines(self) -> list[str]:
        """Format for a terminal; tensors that differ only in a layer number share a line."""
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
