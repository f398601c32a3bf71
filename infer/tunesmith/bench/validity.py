"""Whether a run may be believed. Pure: every doubt that was found, in words with figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import mean, median
from typing import Literal

import numpy as np

from tunesmith.bench.client import Sample
from tunesmith.bench.counters import Counters
from tunesmith.bench.figures import Window

Check = Literal[
    "errors", "token_mismatch", "client_bound", "contaminated", "too_short", "noisy_machine"
]

MOST_FAILED = 0.01  # of all requests
MOST_CACHED = 0.01  # of prompt tokens, beyond what every prompt has in common
MOST_CLIENT_CPU = 0.9  # of one core
LEAST_REQUESTS = 30
LEAST_WINDOW_S = 0.5
MOST_SPREAD = 0.1  # between the rounds' median answers, of their mean


@dataclass(frozen=True)
class Fault:
    """A reason not to believe a run."""

    check: Check
    detail: str


@dataclass(frozen=True)
class Evidence:
    """What one round of a load left behind, apart from its figures."""

    samples: Sequence[Sample]
    counted: Counters
    """By the engine, over the round."""
    common_prefix_tokens: int
    """Tokens that all prompts begin with in spite of their salt: the template's own words."""
    late_s: Sequence[float]
    """How late the client woke up, again and again during the round."""
    client_cpu: float
    """CPU seconds of the client per second of the round."""
    window: Window
    wall_s: float
    """From its start until the last answer ended."""
    reuse: bool = False
    """Whether prompts were to repeat."""
    energy_j: float | None = None
    """What the GPUs took meanwhile."""


def faults(rounds: Sequence[Evidence]) -> list[Fault]:
    """Every reason to call a run INVALID; empty when it is VALID."""
    found: tuple[tuple[Check, str | None], ...] = (
        ("errors", _errors([sample for one in rounds for sample in one.samples])),
        ("token_mismatch", next(filter(None, map(_token_mismatch, rounds)), None)),
        ("client_bound", _client_bound(rounds)),
        ("contaminated", _contaminated(rounds)),
        ("too_short", _too_short(rounds)),
        ("noisy_machine", _noisy_machine(rounds)),
    )
    return [Fault(check, detail) for check, detail in found if detail]


def lag_p99_ms(rounds: Sequence[Evidence]) -> float:
    """How late this client sent requests and woke up, 99th percentile."""
    late_s = chain.from_iterable(
        [*(sample.lag_s for sample in one.samples), *one.late_s] for one in rounds
    )
    return 1000 * float(np.percentile(list(late_s), 99))


def spread(rounds: Sequence[Evidence]) -> float | None:
    """How far rounds of the same load lie apart: their median answers' range, of their mean.

    None of a single round, and where nothing was answered.
    """
    levels_s = [
        median(answered)
        for one in rounds
        if (answered := [sample.e2e_s for sample in one.samples if sample.ok])
    ]
    if len(levels_s) < 2:
        return None
    return (max(levels_s) - min(levels_s)) / mean(levels_s)


def _errors(samples: Sequence[Sample]) -> str | None:
    errors = [sample.error for sample in samples if sample.error]
    if len(errors) <= MOST_FAILED * len(samples):
        return None
    return f"{len(errors)} of {len(samples)} requests failed; the first: {errors[0]}"


def _token_mismatch(evidence: Evidence) -> str | None:
    """The client, the usage records and the engine's counters must agree to the token."""
    answered = [sample for sample in evidence.samples if sample.ok]
    for sample in answered:
        if sample.output_tokens != sample.asked_tokens:
            return (
                f"request {sample.index} has {sample.output_tokens} output tokens "
                f"in place of {sample.asked_tokens}"
            )
        if sum(sample.piece_tokens) != sample.output_tokens:
            return f"request {sample.index} streamed {sum(sample.piece_tokens)} of its tokens"
        if sample.prompt_tokens not in (None, sample.input_tokens):
            return (
                f"request {sample.index} was read as {sample.input_tokens} tokens "
                f"in place of {sample.prompt_tokens}"
            )
    if len(answered) < len(evidence.samples):
        return None  # what the engine did for a failed request is not known here
    for name, seen, counted in (
        ("input", sum(s.input_tokens for s in answered), evidence.counted.prompt_tokens),
        ("output", sum(s.output_tokens for s in answered), evidence.counted.generation_tokens),
    ):
        if seen != counted:
            return f"{seen} {name} tokens by usage, {counted:.0f} by the engine's counters"
    return None


def _client_bound(rounds: Sequence[Evidence]) -> str | None:
    answered = [sample.ttft_s for one in rounds for sample in one.samples if sample.ok]
    allowed_ms = max(10.0, 100 * median(answered)) if answered else 10.0
    lag_ms = lag_p99_ms(rounds)
    if lag_ms > allowed_ms:
        return f"the client was up to {lag_ms:.1f} ms late (p99), {allowed_ms:.1f} ms are allowed"
    busiest = max(one.client_cpu for one in rounds)
    if busiest > MOST_CLIENT_CPU:
        return f"the client used {busiest:.0%} of a core"
    return None


def _contaminated(rounds: Sequence[Evidence]) -> str | None:
    if rounds[0].reuse:
        return None
    queries = max(1.0, sum(one.counted.prefix_cache_queries for one in rounds))
    hits = sum(one.counted.prefix_cache_hits for one in rounds)
    in_common = sum(one.common_prefix_tokens * len(one.samples) for one in rounds) / queries
    if hits / queries <= in_common + MOST_CACHED:
        return None
    return (
        f"{hits / queries:.1%} of prompt tokens came from the prefix cache, "
        f"{in_common:.1%} is what all prompts have in common"
    )


def _too_short(rounds: Sequence[Evidence]) -> str | None:
    requests = sum(len(one.samples) for one in rounds)
    if requests < LEAST_REQUESTS:
        return f"{requests} requests; {LEAST_REQUESTS} are the least"
    steady_s = sum(one.window.length_s for one in rounds)
    if steady_s < LEAST_WINDOW_S:
        return (
            f"{steady_s:.2f} s of steady load; {LEAST_WINDOW_S} s are the least: "
            "raise bench.requests"
        )
    return None


def _noisy_machine(rounds: Sequence[Evidence]) -> str | None:
    apart = spread(rounds)
    if apart is None or apart <= MOST_SPREAD:
        return None
    return (
        f"rounds of the same load lie {apart:.1%} apart, {MOST_SPREAD:.0%} are allowed: "
        "something else runs on this machine, or raise bench.requests"
    )
