"""What became of every tensor, as a table: taken, resized, renewed or ignored."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

Fate = Literal["taken", "resized", "renewed", "ignored"]
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor."""

    name: str
    """Ours where it has one, the file's where it has not."""
    fate: Fate
    """Renewed: the tower keeps its fresh initialisation. Ignored: the file has it and the tower does not."""
    detail: str = ""
    """Shapes, or the reason."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All tensors of a model and of the files that it starts from."""

    title: str
    entries: tuple[Entry, ...]

    def count(self, fate: Fate) -> int:
        """Tensors with that fate."""
        return sum(entry.fate == fate for entry in self.entries)

    def lines(self) -> list[str]:
        """The table; tensors that differ in the number of their block alone share a line."""
        rows = Counter((e.fate, _NUMBER.sub(".*.", e.name), e.detail) for e in self.entries)
        width = max((len(name) for _, name, _ in rows), default=0)
        order: tuple[Fate, ...] = ("taken", "resized", "renewed", "ignored")
        body = [
            f"  {fate:<8} {name:<{width}} {f'x {count}' if count > 1 else '':<5} {detail}".rstrip()
            for fate in order
            for (own, name, detail), count in rows.items()
            if own == fate
        ]
        counts = ", ".join(f"{self.count(fate)} {fate}" for fate in order)
        return [f"{self.title}: {counts}", *body]
