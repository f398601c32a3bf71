"""What the bar of a running batch says."""

from __future__ import annotations

import time
from datetime import timedelta


class Rate:
    """Speed of this attempt, cost of all of them, and when it will be done."""

    def __init__(self, left: int, spent_s: float, usd_per_s: float | None) -> None:
        self._left, self._spent_s, self._usd_per_s = left, spent_s, usd_per_s
        self._started_s = time.monotonic()
        self._rows = self._tokens = 0

    def start(self) -> None:
        """From now on the engine is at rows."""
        self._started_s = time.monotonic()

    def note(self, tokens: int, errors: int) -> str:
        """Count one more row and put all into words."""
        self._rows += 1
        self._tokens += tokens
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        rate = self._rows / elapsed_s
        text = f"{rate:.1f} rows/s, {self._tokens / elapsed_s:,.0f} tokens/s, {errors} errors"
        if self._usd_per_s is not None:
            text += f", {(self._spent_s + elapsed_s) * self._usd_per_s:.4f} USD"
        left = timedelta(seconds=round(max(self._left - self._rows, 0) / rate))
        return f"{text}, {left} left"
