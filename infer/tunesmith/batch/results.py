"""What is kept of an answer until the output is written: plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tunesmith.batch.errors import RowError
from tunesmith.engine import Answer

# What writing a token takes, against reading one; only how a shard's time is shared hangs on it.
_OUTPUT_WEIGHT = 4.0


def result_of(made: Answer | RowError) -> dict[str, Any]:
    """The result of one row, for its shard."""
    if isinstance(made, RowError):
        return {"error": asdict(made)}
    found = {name: value for name, value in vars(made).items() if value is not None}
    found["outputs"] = [
        {name: value for name, value in vars(one).items() if value is not None}
        for one in made.outputs
    ]
    return found


def output_tokens(result: Mapping[str, Any]) -> int:
    """Tokens that were written for a row, over all its samples."""
    return sum(output["output_tokens"] for output in result.get("outputs", ()))


def share_seconds(results: Sequence[Mapping[str, Any]], seconds: float) -> list[float]:
    """Divide the device time of a shard over its rows, by the work that each of them was.

    Tokens found in the prefix cache count for nothing; the shares add up to `seconds`.
    """
    work = [
        max(
            result.get("prompt_tokens", 0) - result.get("cached_tokens", 0)
            + _OUTPUT_WEIGHT * output_tokens(result),
            0.0,
        )
        for result in results
    ]  # fmt: skip
    whole = sum(work)
    if not whole:
        return [seconds / len(results) for _ in results]
    return [seconds * part / whole for part in work]
