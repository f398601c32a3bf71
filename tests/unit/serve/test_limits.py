"""Limits and budgets: never overspent, whatever comes in which order."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.serve.govern.governor import Governor, Grant, RefusedError
from tunesmith.serve.govern.limits import NANO, Limits, Meter, Use

NOON_S = 20_000 * 86_400.0 + 43_200


def test_requests_per_minute_slide_and_say_when_there_is_room() -> None:
    meter = Meter(Limits(requests_per_minute=3))
    for at_s in (0.0, 10.0, 20.0):
        assert meter.refusal(Use(), NOON_S + at_s) is None
        meter.reserve(Use(), NOON_S + at_s)
    refusal = meter.refusal(Use(), NOON_S + 30)
    assert refusal and refusal.limit == "requests_per_minute"
    assert refusal.retry_after_s == 30
    assert meter.refusal(Use(), NOON_S + 60) is None


def test_tokens_per_minute_count_what_was_used_and_not_what_was_reserved() -> None:
    meter = Meter(Limits(tokens_per_minute=100))
    first = meter.reserve(Use(80), NOON_S)
    assert meter.refusal(Use(30), NOON_S)
    meter.settle(first, Use(20), NOON_S + 1)
    assert meter.refusal(Use(80), NOON_S + 2) is None
    never = meter.refusal(Use(101), NOON_S + 2)
    assert never and never.retry_after_s is None


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(0, 90)), max_size=40))
def test_a_minute_counts_what_began_in_it_however_late_it_is_settled(
    calls: list[tuple[int, int, int]],
) -> None:
    """Each call comes some seconds after the one before, reserves, and settles half of it later."""
    meter = Meter(Limits(tokens_per_minute=100))
    running, counted, now_s = [], [], NOON_S
    for pause_s, tokens, takes_s in calls:
        now_s += pause_s
        for due_s, at, held in [one for one in running if one[0] <= now_s]:
            meter.settle(held, Use(held.need.tokens // 2), now_s)
            counted[at] = (counted[at][0], held.need.tokens // 2)
            running.remove((due_s, at, held))
        used = sum(tokens for at_s, tokens in counted if at_s > now_s - 60)
        assert (meter.refusal(Use(tokens), now_s) is None) == (used + tokens <= 100)
        running.append((now_s + takes_s, len(counted), meter.reserve(Use(tokens), now_s)))
        counted.append((now_s, tokens))
    assert len(meter._minute._seconds) <= 60 + len(calls)


def test_a_key_without_limits_takes_no_memory_by_the_second() -> None:
    meter = Meter(Limits())
    for second in range(1_000):
        meter.settle(meter.reserve(Use(1), NOON_S + second), Use(1), NOON_S + second)
    assert len(meter._minute._seconds) <= 60


def test_a_day_ends_at_midnight_and_what_is_open_stays_reserved() -> None:
    meter = Meter(Limits(tokens_per_day=100))
    first = meter.reserve(Use(60), NOON_S)
    refusal = meter.refusal(Use(60), NOON_S)
    assert refusal and refusal.is_reserved and refusal.retry_after_s == 43_200
    meter.settle(first, Use(50), NOON_S)
    refusal = meter.refusal(Use(60), NOON_S)
    assert refusal and not refusal.is_reserved
    meter.reserve(Use(50), NOON_S)
    tomorrow_s = NOON_S + 43_200
    assert meter.refusal(Use(50), tomorrow_s) is None
    assert meter.refusal(Use(51), tomorrow_s)


def test_money_adds_up_without_fractions() -> None:
    meter = Meter(Limits(usd_per_day=1.0))
    for _ in range(10):
        assert meter.refusal(Use(1, NANO // 10), NOON_S) is None
        meter.settle(meter.reserve(Use(1, NANO // 10), NOON_S), Use(1, NANO // 10), NOON_S)
    assert meter.spent == Use(10, NANO)
    assert meter.refusal(Use(1, 1), NOON_S)


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), max_size=60), st.randoms())
def test_settled_use_never_passes_the_budget(
    wanted: list[tuple[int, float]], dice: random.Random
) -> None:
    meter = Meter(Limits(tokens_per_day=100, concurrent_requests=5))
    running = []
    for step, (tokens, share) in enumerate(wanted):
        if meter.refusal(Use(tokens), NOON_S + step) is None:
            running.append((meter.reserve(Use(tokens), NOON_S + step), int(tokens * share)))
        if running and dice.random() < 0.5:
            held, used = running.pop(dice.randrange(len(running)))
            meter.settle(held, Use(used), NOON_S + step)
        assert meter.open == len(running) <= 5
        assert meter.spent.tokens + sum(held.need.tokens for held, _ in running) <= 100
    for held, used in running:
        meter.settle(held, Use(used), NOON_S)
    assert meter.spent.tokens <= 100


def test_two_hundred_at_once_on_a_budget_worth_ten() -> None:
    """Each may use 100 and uses 50: ten fit, eleven never do, and nobody gives up too early."""
    key, group = ("key", "a"), ("group", "g")
    subjects = {key: Limits(tokens_per_day=500), group: Limits(tokens_per_day=10_000)}

    async def play() -> tuple[int, int]:
        governor = Governor({}, 0, longest_wait_s=5)

        async def one() -> int:
            try:
                grant = await governor.admit(subjects, Use(100))
            except RefusedError as error:
                assert error.subject == key and error.refusal.limit == "tokens_per_day"
                return 0
            await asyncio.sleep(0.002)
            governor.settle(grant, Use(50))
            return 1

        admitted = sum(await asyncio.gather(*(one() for _ in range(200))))
        return admitted, governor.meter(key, subjects[key]).spent.tokens

    admitted, spent = asyncio.run(play())
    assert spent <= 500
    assert admitted >= 9


def test_what_the_group_lacks_is_not_taken_from_the_key() -> None:
    async def play() -> None:
        governor = Governor({("group", "g"): Use(95)}, int(NOON_S // 86_400), longest_wait_s=0)
        subjects = {("key", "a"): Limits(tokens_per_day=50), ("group", "g"): Limits()}
        grants: list[Grant] = []
        for _, tokens in zip(range(2), itertools.repeat(20), strict=False):
            grants.append(await governor.admit(subjects, Use(tokens)))
        for grant in grants:
            governor.settle(grant, Use(10))
        tight = subjects | {("group", "g"): Limits(concurrent_requests=0)}
        with pytest.raises(RefusedError) as caught:
            await governor.admit(tight, Use(1))
        assert caught.value.subject == ("group", "g")
        key = governor.meter(("key", "a"), subjects["key", "a"])
        assert key.open == 0 and key.spent == Use(20)

    asyncio.run(play())
