"""What a rollout decides, and how often it is wrong when it is looked at all the time."""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.config.schema.routes import Rollout
from tunesmith.serve.rollout.decide import Evidence, Plan, decide
from tunesmith.serve.rollout.sequential import difference, proportion

PLAN = Plan.of(Rollout(), 0)
CLEAN = Evidence(requests=5000, baseline_requests=5000, timed_pairs=5000, priced_pairs=5000)


@given(st.integers(0, 400), st.integers(0, 400), st.floats(0.0001, 0.5))
def test_an_interval_holds_what_was_seen_and_narrows(some: int, more: int, alpha: float) -> None:
    trials = some + more
    low, high = proportion(some, trials, alpha)
    assert 0.0 <= low <= high <= 1.0
    if trials:
        assert low <= some / trials <= high
        wider = proportion(some, trials, alpha / 2)
        assert wider.low <= low + 1e-9 and high <= wider.high + 1e-9
        longer = proportion(some * 10, trials * 10, alpha)
        assert longer.high - longer.low <= high - low + 1e-9
    low, high = difference(some, trials, 0, 400, alpha)
    assert -1.0 <= low <= high <= 1.0


def test_looked_at_after_every_trial_it_leaves_the_truth_out_as_rarely_as_promised() -> None:
    """An ordinary 90 % interval would leave it out in most of these runs at some look."""
    drawn, p, alpha, runs, missed = random.Random(17), 0.2, 0.1, 120, 0
    for _ in range(runs):
        seen = 0
        for trials in range(1, 151):
            seen += drawn.random() < p
            low, high = proportion(seen, trials, alpha)
            if not low <= p <= high:
                missed += 1
                break
    assert missed <= runs * alpha


def test_little_evidence_holds_and_much_goes_on() -> None:
    assert decide(PLAN, 0, Evidence()).action == "hold"
    few = Evidence(requests=49, errors=49, baseline_requests=5000)
    assert decide(PLAN, 0, few).action == "hold"
    assert decide(PLAN, 0, CLEAN).action == "advance"
    assert decide(PLAN, 1, CLEAN).action == "advance"
    assert decide(PLAN, 2, CLEAN).action == "complete"
    some = Evidence(requests=60, baseline_requests=5000, timed_pairs=60)
    assert decide(PLAN, 0, some).action == "advance"
    # What is enough to go from 1 to 10 % is not enough to go from 50 to 100 %.
    assert decide(PLAN, 2, some).action == "hold"


@pytest.mark.parametrize(
    ("worse", "signal"),
    [
        ({"errors": 1500}, "errors"),
        ({"slower": 3000}, "latency"),
        ({"dearer": 3000}, "cost"),
    ],
)
def test_each_signal_alone_takes_it_back(worse: dict[str, int], signal: str) -> None:
    decision = decide(PLAN, 0, Evidence(**asdict(CLEAN) | worse))
    assert decision.action == "roll back" and decision.reason == f"worse: {signal}"
    found = decision.signals[signal]
    assert found["low"] > found["back_above"]


def test_what_is_not_looked_at_does_not_count() -> None:
    plan = Plan.of(Rollout(latency_tolerance=None, cost_tolerance=None), 0)
    slow = Evidence(requests=5000, baseline_requests=5000, timed_pairs=5000, slower=5000)
    assert decide(plan, 0, slow).action == "advance"


def test_probes_are_waited_for_and_few_lost_ones_do_not_decide() -> None:
    plan = Plan.of(Rollout(), 20)

    def after(probes: int, lost: int, won: int = 0) -> str:
        return decide(
            plan, 0, Evidence(**asdict(CLEAN) | {"probes": probes, "lost": lost, "won": won})
        ).action

    assert after(19, 0) == "hold" and after(20, 0) == "advance"
    assert after(20, 1, won=1) == "advance"
    assert after(20, 1) == "hold"  # worse on the set by more than the tolerance, perhaps by chance
    assert after(20, 20) == "roll back"
    # They need no traffic.
    assert decide(plan, 0, Evidence(probes=20, lost=20)).action == "roll back"


def test_equal_arms_are_hardly_ever_taken_back() -> None:
    """Errors, slow answers and prices of the same kind on both sides, looked at all the time."""
    drawn, false = random.Random(17), 0
    for _ in range(60):
        seen, step = Evidence(), 1
        old: list[float] = []
        for number in itertools.count():
            is_new = drawn.random() < PLAN.shares[step]
            is_error, taken_s = drawn.random() < 0.05, drawn.lognormvariate(0, 1)
            if is_new:
                seen.requests += 1
                seen.errors += is_error
                if old:
                    seen.timed_pairs += 1
                    seen.slower += taken_s > 1.25 * old.pop()
            else:
                seen.baseline_requests += 1
                seen.baseline_errors += is_error
                old.append(taken_s)
            if number % 25 == 0:
                action = decide(PLAN, step, seen).action
                false += action == "roll back"
                if action != "hold":
                    break
            if number > 3000:
                break
    assert false == 0
