"""The account of a loaded network: for every module, what was loaded, initialised by rule and skipped by
rule."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("loaded", "initialised", "skipped")


@dataclass(frozen=True)
class Count:
    """How many arrays, and their bytes in float32."""

    arrays: int = 0
    bytes: int = 0

    def __bool__(self) -> bool:
        return self.arrays > 0

    def __str__(self) -> str:
        return f"{self.arrays} ({self.bytes / 1e6:.2f} MB)" if self else "-"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One module: its mode, and the card it came from, if any."""

    module: str
    mode: str
    card: str = ""
    sha256: str = ""
    loaded: Count = Count()
    initialised: Count = Count()
    skipped: Count = Count()

    @classmethod
    def of(
        cls, module: str, mode: str, card: str = "", sha256: str = "", **arrays: Mapping[str, Any]
    ) -> "Line":
        """From arrays (or their shapes) by name, for each of `loaded`, `initialised` and `skipped`."""
        counts = {
            kind: Count(len(some), 4 * sum(math.prod(array.shape) for array in some.values()))
            for kind, some in arrays.items()
        }
        return cls(module=module, mode=mode, card=card, sha256=sha256, **counts)


@dataclass(frozen=True)
class Report:
    """A line a module."""

    lines: tuple[Line, ...]

    def total(self, kind: str) -> Count:
        """Of all modules, `kind` one of KINDS."""
        counts = [getattr(line, kind) for line in self.lines]
        return Count(sum(count.arrays for count in counts), sum(count.bytes for count in counts))

    def table(self) -> str:
        """Readable text, one line a module and one for all."""
        rows = [["module", "mode", *KINDS, "card"]]
        rows += [
            [line.module, line.mode, *(str(getattr(line, kind)) for kind in KINDS), line.card or "-"]
            for line in self.lines
        ]
        rows.append(["all", "", *(str(self.total(kind)) for kind in KINDS), ""])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def json(self) -> dict[str, Any]:
        """`{"modules": {name: {mode, card, sha256, loaded: {arrays, bytes}, ...}}, "total": {...}}`."""
        modules = {line.module: dataclasses.asdict(line) for line in self.lines}
        for line in modules.values():
            del line["module"]
        return {"modules": modules, "total": {kind: dataclasses.asdict(self.total(kind)) for kind in KINDS}}
