"""What the benchmarks share: samples, medians, and a line that says whether a promise is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Samples:
    """Seconds (or another unit) of one thing, measured again and again."""

    values: list[float] = field(default_factory=list)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Add how long the block takes."""
        begin = time.perf_counter()
        yield
        self.values.append(time.perf_counter() - begin)

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{self.median:.3f} (min {low:.3f}, max {high:.3f}, n {len(self.values)})"


def promise(
    what: str, value: float, limit: float, unit: str = "", *, at_least: bool = False
) -> dict[str, object]:
    """Print whether ``value`` keeps within ``limit``, and return it for the summary."""
    kept = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    print(f"  {'ok  ' if kept else 'MISS'} {what}: {value:.3f}{unit} (promised {sign} {limit:g}{unit})")
    return {"what": what, "value": round(value, 4), "limit": limit, "unit": unit, "kept": kept}
