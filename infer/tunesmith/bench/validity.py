"""Whether a run may be believed. Pure: every doubt that was found, in words with figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from tunesmith.bench.client import Sample
from tunesmith.bench.counters import Counters
from tunesmith.bench.figures import Window

Check = Literal["errors", "token_mismatch", "client_bound", "contaminated", "too_short"]

MOST_FAILED = 0.01  # of all requests
MOST_CACHED = 0.01  # of prompt tokens, beyond what every prompt has in common
MOST_CLIENT_CPU = 0.9  # of one core
LEAST_REQUESTS = 30
LEAST_WINDOW_S = 0.5


@dataclass(frozen=True)
class Fault:
    """A reason not to believe a run."""

    check: Check
    detail: str


@dataclass(frozen=True)
class Evidence:
    """What a phase left behind, apart from its figures."""

    samples: Sequence[Sample]
    asked_tokens: int
    """Output tokens each request had to make."""
    counted: Counters
    """By the engine, over the phase."""
    common_prefix_tokens: int
    """Tokens that all prompts begin with in spite of their salt: the template's own words."""
    late_s: Sequence[float]
    """How late the client woke up, again and again during the phase."""
    client_cpu: float
    """CPU seconds of the client per second of the phase."""
    window: Window


def faults(evidence: Evidence) -> list[Fault]:
    """Every reason to call the run INVALID; empty when it is VALID."""
    found: tuple[tuple[Check, str | None], ...] = (
        ("errors", _errors(evidence.samples)),
        ("token_mismatch", _token_mismatch(evidence)),
        ("client_bound", _client_bound(evidence)),
        ("contaminated", _contaminated(evidence)),
        ("too_short", _too_short(evidence)),
    )
    return [Fault(check, detail) for check, detail in found if detail]


def lag_p99_ms(evidence: Evidence) -> float:
    """How late this client sent requests and woke up, 99th percentile."""
    late_s = [*(sample.lag_s for sample in evidence.samples), *evidence.late_s]
    return 1000 * float(np.percentile(late_s, 99))


def _errors(samples: Sequence[Sample]) -> str | None:
    errors = [sample.error for sample in samples if sample.error]
    if len(errors) <= MOST_FAILED * len(samples):
        return None
    return f"{len(errors)} of {len(samples)} requests failed; the first: {errors[0]}"


def _token_mismatch(evidence: Evidence) -> str | None:
    """The client, the usage records and the engine's counters must agree to the token."""
    answered = [sample for sample in evidence.samples if sample.ok]
    for sample in answered:
        if sample.output_tokens != evidence.asked_tokens:
            return (
                f"request {sample.index} has {sample.output_tokens} output tokens "
                f"in place of {evidence.asked_tokens}"
            )
        if sum(sample.piece_tokens) != sample.output_tokens:
            return f"request {sample.index} streamed {sum(sample.piece_tokens)} of its tokens"
    if len(answered) < len(evidence.samples):
        return None  # what the engine did for a failed request is not known here
    for name, seen, counted in (
        ("input", sum(s.input_tokens for s in answered), evidence.counted.prompt_tokens),
        ("output", sum(s.output_tokens for s in answered), evidence.counted.generation_tokens),
    ):
        if seen != counted:
            return f"{seen} {name} tokens by usage, {counted:.0f} by the engine's counters"
    return None


def _client_bound(evidence: Evidence) -> str | None:
    answered = [sample.ttft_s for sample in evidence.samples if sample.ok]
    allowed_ms = max(10.0, 100 * median(answered)) if answered else 10.0
    lag_ms = lag_p99_ms(evidence)
    if lag_ms > allowed_ms:
        return f"the client was up to {lag_ms:.1f} ms late (p99), {allowed_ms:.1f} ms are allowed"
    if evidence.client_cpu > MOST_CLIENT_CPU:
        return f"the client used {evidence.client_cpu:.0%} of a core"
    return None


def _contaminated(evidence: Evidence) -> str | None:
    queries = max(1.0, evidence.counted.prefix_cache_queries)
    in_common = evidence.common_prefix_tokens * len(evidence.samples) / queries
    if evidence.counted.hit_rate <= in_common + MOST_CACHED:
        return None
    return (
        f"{evidence.counted.hit_rate:.1%} of prompt tokens came from the prefix cache, "
        f"{in_common:.1%} is what all prompts have in common"
    )


def _too_short(evidence: Evidence) -> str | None:
    if len(evidence.samples) < LEAST_REQUESTS:
        return f"{len(evidence.samples)} requests; {LEAST_REQUESTS} are the least"
    if evidence.window.length_s < LEAST_WINDOW_S:
        return (
            f"{evidence.window.length_s:.2f} s of steady load; {LEAST_WINDOW_S} s are the least: "
            "raise bench.requests"
        )
    return None
