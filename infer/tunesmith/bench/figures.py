"""From samples to figures. Pure: values in, values out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from statistics import median
from typing import NamedTuple

import numpy as np

from tunesmith.bench.client import Sample
from tunesmith.config.schema.bench import Slo
from tunesmith.statistics import Interval, clustered_percentiles, percentile, ratio_of_sums

PERCENTILES = (50, 95, 99)
_MOST_SLICES, _LEAST_SLICES = 20, 4


class Window(NamedTuple):
    """The part of a phase in which the load was as asked; seconds of the phase."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return max(0.0, self.end_s - self.start_s)


Round = tuple[Sequence[Sample], Window]
"""One repetition of a load."""


def full_queue_window(samples: Sequence[Sample], concurrency: int) -> Window:
    """Closed loop: from when all places were taken until one stayed empty."""
    sent = sorted(sample.sent_s for sample in samples)
    if len(sent) < concurrency:
        return Window(0.0, 0.0)
    end_s = min(sample.ended_s for sample in samples if sample.ended_s > sent[-1])
    return Window(sent[concurrency - 1], end_s)


def arrivals_window(samples: Sequence[Sample]) -> Window:
    """Open loop: from when as many requests were in flight as will be, to the last arrival.

    It takes one answer's time until departures begin; after the last arrival they only drain.
    """
    answered = [sample.e2e_s for sample in samples if sample.ok]
    first_s = samples[0].intended_s
    settled_s = first_s + (median(answered) if answered else 0.0)
    return Window(settled_s, samples[-1].intended_s)


@dataclass(frozen=True)
class Throughput:
    """Rates over a window, counted token by token and not by finished requests."""

    output_tokens_per_s: Interval
    input_tokens_per_s: float
    requests_per_s: float


def throughput(rounds: Sequence[Round], seed: int) -> Throughput | None:
    """What came out within the rounds' windows; None when nothing did.

    An input counts when its first token arrives, a request as the share of its output tokens that
    fall into the window. The interval resamples equal slices of the windows, each as long as an
    answer takes where there are enough of them (a shorter one would see only the reading of
    prompts, or only the writing). It shows how even this run was, and knows nothing of the next.
    """
    tokens: list[float] = []
    lengths_s: list[float] = []
    requests = inputs = window_s = 0.0
    for samples, window in rounds:
        if not window.length_s:
            continue
        answered = [sample for sample in samples if sample.ok]
        window_s += window.length_s
        inputs += sum(
            sample.input_tokens * (window.start_s <= sample.piece_s[0] < window.end_s)
            for sample in answered
        )
        requests += sum(_tokens_in(sample, window) / sample.output_tokens for sample in answered)
        per_slice = _slices(answered, window)
        tokens += per_slice
        lengths_s += [window.length_s / len(per_slice)] * len(per_slice)
    if not sum(tokens):
        return None
    return Throughput(
        output_tokens_per_s=ratio_of_sums(tokens, lengths_s, seed=seed),
        input_tokens_per_s=inputs / window_s,
        requests_per_s=requests / window_s,
    )


def tokens_per_s(samples: Sequence[Sample], window: Window) -> float:
    """Output tokens of a window alone; 0 of an empty one."""
    if not window.length_s:
        return 0.0
    return sum(_tokens_in(sample, window) for sample in samples if sample.ok) / window.length_s


def _tokens_in(sample: Sample, window: Window) -> int:
    pieces = zip(sample.piece_s, sample.piece_tokens, strict=True)
    return sum(tokens for at_s, tokens in pieces if window.start_s <= at_s < window.end_s)


def _slices(answered: Sequence[Sample], window: Window) -> list[float]:
    """Output tokens in equal parts of the window."""
    answer_s = median(sample.e2e_s for sample in answered) if answered else window.length_s
    count = max(_LEAST_SLICES, min(_MOST_SLICES, int(window.length_s / answer_s)))
    edges_s = [window.start_s + window.length_s / count * place for place in range(1, count)]
    found = [0.0] * count
    for sample in answered:
        for moment_s, tokens in zip(sample.piece_s, sample.piece_tokens, strict=True):
            if window.start_s <= moment_s < window.end_s:
                found[bisect_left(edges_s, moment_s)] += tokens
    return found


def latencies_ms(samples: Sequence[Sample], seed: int) -> dict[str, dict[str, Interval]]:
    """TTFT, TPOT, ITL and end-to-end time of the answered requests: name → percentile → interval.

    A percentile is left out when fewer than one sample would lie beyond it. Requests are drawn in
    runs of neighbours, which wait in the same queue; the gaps of an answer are drawn together.
    """
    answered = [sample for sample in samples if sample.ok]
    columns_s = {
        "ttft_ms": [sample.ttft_s for sample in answered],
        "tpot_ms": [sample.tpot_s for sample in answered if sample.tpot_s is not None],
        "e2e_ms": [sample.e2e_s for sample in answered],
    }
    found = {
        name: {
            f"p{percent}": percentile(
                [1000 * value for value in column_s], percent, seed=seed, block=isqrt(len(column_s))
            )
            for percent in _known(len(column_s))
        }
        for name, column_s in columns_s.items()
    }
    gaps_ms = [[1000 * gap_s for gap_s in sample.itl_s] for sample in answered]
    percents = _known(sum(map(len, gaps_ms)))
    levels = clustered_percentiles(gaps_ms, percents, seed=seed) if percents else []
    return found | {"itl_ms": {f"p{at}": level for at, level in zip(percents, levels, strict=True)}}


def _known(count: int) -> list[int]:
    """The percentiles that so many values can tell."""
    return [percent for percent in PERCENTILES if count * (100 - percent) >= 100]


def round_figures(samples: Sequence[Sample], window: Window) -> dict[str, float]:
    """The figures of one round by name, such as `ttft_ms p95`, without intervals."""
    answered = [sample for sample in samples if sample.ok]
    columns_s = {
        "ttft_ms": [sample.ttft_s for sample in answered],
        "tpot_ms": [sample.tpot_s for sample in answered if sample.tpot_s is not None],
        "e2e_ms": [sample.e2e_s for sample in answered],
        "itl_ms": [gap_s for sample in answered for gap_s in sample.itl_s],
    }
    found = {
        f"{name} p{percent}": 1000 * float(np.percentile(column_s, percent))
        for name, column_s in columns_s.items()
        for percent in PERCENTILES
        if column_s
    }
    return found | {"output_tokens_per_s": tokens_per_s(samples, window)}


@dataclass(frozen=True)
class Goodput:
    """What a promise leaves of the throughput; a failed request is a broken promise."""

    share: float
    """Requests that kept the promise, of all that arrived."""
    requests_per_s: float
    slo_kept: bool
    """Whether at least 95 % of all requests kept each limit."""


def goodput(rounds: Sequence[Sequence[Sample]], slo: Slo) -> Goodput:
    """Count requests within the limits over the time from the first arrival to the last end."""
    samples = [sample for one in rounds for sample in one]
    first_token = [sample.ok and sample.ttft_s * 1000 <= slo.ttft_p95_ms for sample in samples]
    each_token = [
        sample.ok and (sample.tpot_s or 0.0) * 1000 <= slo.tpot_p95_ms for sample in samples
    ]
    good = sum(map(all, zip(first_token, each_token, strict=True)))
    return Goodput(
        share=good / len(samples),
        requests_per_s=good / sum(map(_span_s, rounds)),
        slo_kept=min(sum(first_token), sum(each_token)) >= 0.95 * len(samples),
    )


def _span_s(samples: Sequence[Sample]) -> float:
    return max(sample.ended_s for sample in samples) - samples[0].intended_s


def idle_s(samples: Sequence[Sample]) -> float:
    """Seconds between the first arrival and the last end in which no request was in flight."""
    idle, busy_until_s = 0.0, samples[0].intended_s
    for sample in sorted(samples, key=lambda sample: sample.sent_s):
        idle += max(0.0, sample.sent_s - busy_until_s)
        busy_until_s = max(busy_until_s, sample.ended_s)
    return idle
