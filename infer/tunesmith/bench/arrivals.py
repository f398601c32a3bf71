"""When requests arrive. Pure: fixed before the load starts, so that a slow engine cannot slow its
own load down, and every variant meets the same moments."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.config import DataError, require
from tunesmith.config.schema.bench import Bench
from tunesmith.pipeline.bench import log_files

_COLUMN = "at_s"


def arrivals(bench: Bench, rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` requests arrive, at `rate` per second on average.

    Random gaps are left as they fall: scaled to fit the mean, they would lose the bursts that
    make a queue.
    """
    match bench.arrivals:
        case "constant":
            return [index / rate for index in range(count)]
        case "trace":
            moments = read_moments(bench.trace or _log_of(bench))
            return replayed(moments, rate, count)
        case "gamma":
            return gamma_arrivals(rate, bench.burstiness, count, seed)
        case _:
            return poisson_arrivals(rate, count, seed)


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Independent arrivals: exponential gaps."""
    source = random.Random(f"{seed}/arrivals")
    return _moments([source.expovariate(rate) for _ in range(count - 1)])


def gamma_arrivals(rate: float, burstiness: float, count: int, seed: int) -> list[float]:
    """Gaps of mean 1 / rate and variance burstiness / rate²."""
    source = random.Random(f"{seed}/arrivals")
    shape, scale_s = 1 / burstiness, burstiness / rate
    return _moments([source.gammavariate(shape, scale_s) for _ in range(count - 1)])


def replayed(moments_s: Sequence[float], rate: float, count: int) -> list[float]:
    """The recorded moments at another mean rate, from the start again when there are too few.

    One scale for all gaps: a trace's own bursts stay as many times its mean as they were.
    """
    ordered = sorted(moments_s)
    span_s = ordered[-1] - ordered[0] if ordered else 0.0
    if len(ordered) < 2 or not span_s:
        raise DataError("a trace needs two arrivals at least, at different moments")
    gap_s = span_s / (len(ordered) - 1)
    scale = 1 / (rate * gap_s)
    period_s = span_s + gap_s
    return [
        scale * (lap * period_s + ordered[place] - ordered[0])
        for lap, place in (divmod(index, len(ordered)) for index in range(count))
    ]


def read_moments(path: Path) -> list[float]:
    """The column `at_s` of a Parquet, CSV or JSONL file, or of a folder of Parquet files."""
    found: list[Any] = []
    try:
        for file in log_files(path):
            if file.suffix == ".parquet":
                table = require("pyarrow.parquet", "infer").read_table(file, columns=[_COLUMN])
                found += table[_COLUMN].to_pylist()
                continue
            with file.open(encoding="utf-8", newline="") as lines:
                rows = csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, lines)
                found += [row[_COLUMN] for row in rows]
        return [float(moment) for moment in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: a trace needs the seconds of every arrival in {_COLUMN}: {error}"
        ) from error


def _log_of(bench: Bench) -> Path:
    assert bench.log  # the schema asks for one of the two
    return bench.log


def _moments(gaps_s: Sequence[float]) -> list[float]:
    """From the gaps between arrivals to their moments; the first is at 0."""
    moments = [0.0]
    for gap_s in gaps_s:
        moments.append(moments[-1] + gap_s)
    return moments
