"""Against an upstream with known behaviour: true figures, and every fault found for its reason.

Delays are long against the few milliseconds that a busy machine adds to both ends.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import Counter

import numpy as np
import pytest
from upstream import PROMPTS, served

from tunesmith.bench.arrivals import poisson_arrivals
from tunesmith.bench.client import open_session
from tunesmith.bench.figures import latencies_ms
from tunesmith.bench.generator import Generator
from tunesmith.bench.measure import Instruments, Target, open_meter
from tunesmith.bench.results import phase_figures
from tunesmith.bench.traffic import synthetic_prompts
from tunesmith.bench.validity import spread
from tunesmith.config import DataError, TunesmithError
from tunesmith.config.schema.bench import Bench


def measure(metered, upstream, bench, phase="arrivals"):
    async def load():
        async with metered(upstream, bench) as meter:
            return await getattr(meter, phase)()

    return asyncio.run(load())


TRIES = 3  # a machine that does other things meanwhile is late in some; a wrong figure is in all


def assert_within_5_percent(metered, make_upstream, bench, truths_s):
    """Measured until every figure is true at p50, p95 and p99, three times at most."""
    for _ in range(TRIES):
        phase = measure(metered, make_upstream(), bench)
        found = latencies_ms(phase.samples, seed=0)
        off = {
            f"{name} p{percent}": (found[name][f"p{percent}"].value, true_ms)
            for name, true_s in truths_s.items()
            for percent in (50, 95, 99)
            if (true_ms := 1000 * float(np.percentile(true_s, percent)))
            != pytest.approx(found[name][f"p{percent}"].value, rel=0.05)
        }
        if not off and not phase.faults:
            return phase
    raise AssertionError(f"{off}, {phase.faults}")


def waits(arrivals_s, service_s):
    """From arrival to the end of service, one after the other."""
    free_s, found = 0.0, []
    for arrival_s in arrivals_s:
        free_s = max(arrival_s, free_s) + service_s
        found.append(free_s - arrival_s)
    return found


def test_constant_latency(metered, upstream):
    bench = Bench(rounds=1, requests=120, request_rate=60, max_tokens=8)
    truths_s = {"ttft_ms": [0.6], "tpot_ms": [0.08], "e2e_ms": [0.6 + 7 * 0.08]}
    assert_within_5_percent(metered, lambda: upstream(ttft_s=0.6, tpot_s=0.08), bench, truths_s)


def test_a_queue_before_one_server(metered, upstream):
    """Waiting times of Poisson arrivals and constant service, by Lindley's recursion."""
    service_s, rate, count = 0.06, 14.0, 100
    true_s = waits(poisson_arrivals(rate, count, seed=3), service_s)
    bench = Bench(rounds=1, requests=count, request_rate=rate, max_tokens=1)
    assert_within_5_percent(
        metered, lambda: upstream(ttft_s=service_s, one_at_a_time=True), bench, {"ttft_ms": true_s}
    )


def test_a_stall_is_felt_by_everyone_who_arrives_in_it(metered, upstream):
    rate, count, ttft_s, stall = 50.0, 150, 0.5, (0.5, 1.5)
    true_s = [
        (stall[1] - arrival_s if stall[0] <= arrival_s < stall[1] else 0.0) + ttft_s
        for arrival_s in poisson_arrivals(rate, count, seed=3)
    ]
    bench = Bench(rounds=1, requests=count, request_rate=rate, max_tokens=1)
    assert_within_5_percent(
        metered, lambda: upstream(ttft_s=ttft_s, stall=stall), bench, {"ttft_ms": true_s}
    )


def test_tokens_in_bursts(metered, upstream):
    """A reader waits for four tokens at a time, and gets them at 80 ms each."""
    bench = Bench(rounds=1, requests=150, request_rate=60, max_tokens=12)
    truths_s = {"itl_ms": [0.32], "tpot_ms": [0.08], "ttft_ms": [0.4 + 3 * 0.08]}
    phase = assert_within_5_percent(
        metered, lambda: upstream(ttft_s=0.4, tpot_s=0.08, burst=4), bench, truths_s
    )
    assert phase.samples[0].piece_tokens == (4, 4, 4)


def test_concurrency_is_kept_and_warm_up_is_apart(metered, upstream):
    bench = Bench(rounds=1, requests=40, concurrency=8, max_tokens=10)
    fake = upstream(ttft_s=0.1, tpot_s=0.02)

    async def load():
        async with metered(fake, bench) as meter:
            return await meter.warm_up(), await meter.prompts_only(), await meter.full_queue()

    warm_up, prompts_only, full_queue = asyncio.run(load())
    assert [len(p.samples) for p in (warm_up, prompts_only, full_queue)] == [8, 40, 40]
    assert full_queue.faults == []
    assert full_queue.rounds[0].wall_s == pytest.approx(40 / 8 * (0.1 + 9 * 0.02), rel=0.1)
    contents = [body["messages"][0]["content"] for body in fake.asked]
    assert len(set(contents)) == len(contents) == 88
    for body in fake.asked:
        assert body["ignore_eos"] and body["stream_options"]["include_usage"]


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("http", "errors", "HTTP 500: out of order"),
        ("error", "errors", "the engine died"),
        ("truncated", "errors", "ended before the answer did"),
        ("abort", "errors", "finish_reason abort"),
        ("short", "token_mismatch", "5 output tokens in place of 6"),
        ("lost_token", "token_mismatch", "5 output tokens in place of 6"),
        ("uncounted", "token_mismatch", "by the engine's counters"),
    ],
)
def test_a_faulty_answer_makes_the_run_invalid(metered, upstream, fault, check, words):
    bench = Bench(rounds=1, requests=30, request_rate=200, max_tokens=6)
    phase = measure(metered, upstream(fault=fault), bench)
    found = {fault.check: fault.detail for fault in phase.faults}
    assert words in found.pop(check)
    assert found.keys() <= {"too_short", "client_bound"}
    assert len(phase.discarded) == 1


def test_cached_prompts_make_the_run_invalid(metered, upstream):
    bench = Bench(rounds=1, requests=30, request_rate=40, max_tokens=4)
    phase = measure(metered, upstream(hit_rate=0.5), bench)
    assert {"contaminated"} == {fault.check for fault in phase.faults} - {"client_bound"}
    assert "50.0%" in phase.faults[-1].detail


def test_what_all_prompts_have_in_common_is_no_contamination(metered, upstream):
    """The stand-in's template begins every prompt of 20 tokens with the same two."""
    bench = Bench(rounds=1, requests=30, request_rate=40, max_tokens=4)
    phase = measure(metered, upstream(ttft_s=0.2, hit_rate=0.1), bench)
    assert phase.faults == []


def test_a_lagging_client_makes_the_run_invalid_and_hides_nothing(metered, upstream, generator):
    """The generator is stopped for 0.4 s, as a machine does that has no core left for it."""
    bench = Bench(rounds=1, requests=60, request_rate=60, max_tokens=4)
    fake = upstream(ttft_s=0.01)

    async def load():
        async with metered(fake, bench) as meter:
            loop = asyncio.get_running_loop()
            for delay_s in (0.3, 1.8):  # an invalid run is measured again
                loop.call_later(delay_s, os.kill, generator.pid, signal.SIGSTOP)
                loop.call_later(delay_s + 0.4, os.kill, generator.pid, signal.SIGCONT)
            return await meter.arrivals()

    phase = asyncio.run(load())
    assert (
        "client_bound" in {fault.check for fault in phase.faults} <= {"client_bound", "too_short"}
    )
    assert max(sample.ttft_s for sample in phase.samples) > 0.3


def test_a_machine_that_grows_slower_is_noisy(metered, upstream):
    bench = Bench(rounds=2, requests=40, concurrency=8, max_tokens=4)
    phase = measure(metered, upstream(ttft_s=0.05, tpot_s=0.02, drift=1.3), bench, "full_queue")
    (noise,) = (fault for fault in phase.faults if fault.check != "client_bound")
    assert noise.check == "noisy_machine"
    assert re.search("2[0-9][.][0-9]% apart", noise.detail)
    assert len(phase.rounds) == 2 and len(phase.samples) == 80


def test_rounds_of_a_steady_machine_are_the_same(metered, upstream):
    bench = Bench(rounds=2, requests=40, request_rate=40, max_tokens=4)
    fake = upstream(ttft_s=0.2)
    phase = measure(metered, fake, bench)
    assert {fault.check for fault in phase.faults} <= {"client_bound"}
    assert spread(phase.rounds) == pytest.approx(0, abs=0.05)
    contents = {body["messages"][0]["content"] for body in fake.asked}
    assert len(contents) == 80 * (1 + len(phase.discarded))


def test_too_little_to_say_anything(metered, upstream):
    phase = measure(
        metered, upstream(), Bench(rounds=1, requests=12, request_rate=100, max_tokens=4)
    )
    assert [fault.check for fault in phase.faults] == ["too_short"]


def test_nobody_answers(metered, upstream):
    with pytest.raises(TunesmithError, match="none of 4 requests was answered.*HTTP 500"):
        measure(metered, upstream(fault="http"), Bench(concurrency=4), "warm_up")


def test_no_prompt_fits(metered, upstream):
    with pytest.raises(DataError, match=r"512.*bench\.max_tokens"):
        measure(metered, upstream(), Bench(max_tokens=500))


def test_random_prompts_have_exactly_their_tokens(metered, upstream):
    lengths = (
        {"input_tokens": 7, "output_tokens": 3},
        {"input_tokens": 90, "output_tokens": 5, "share": 3},
    )
    bench = Bench(rounds=1, requests=40, request_rate=200, prompts="synthetic", lengths=lengths)
    fake = upstream(ttft_s=0.2)

    async def load():
        async with metered(fake, bench, synthetic_prompts(bench, 3)) as meter:
            return await meter.arrivals()

    phase = asyncio.run(load())
    assert {fault.check for fault in phase.faults} <= {"too_short"}
    found = Counter((s.input_tokens, s.output_tokens) for s in phase.samples)
    assert found == {(7, 3): 10, (90, 5): 30}
    assert len({tuple(body["prompt"]) for body in fake.asked}) == len(fake.asked)


def test_where_reuse_is_the_question_hits_are_reported_and_no_fault(metered, upstream):
    bench = Bench(rounds=1, requests=40, request_rate=40, max_tokens=4, reuse=True)
    fake = upstream(ttft_s=0.2, hit_rate=0.5)
    phase = measure(metered, fake, bench)
    assert {fault.check for fault in phase.faults} <= {"client_bound"}
    assert phase_figures(phase, bench, 0)["cache_hit_rate"] == pytest.approx(0.5)
    assert len({body["messages"][0]["content"] for body in fake.asked}) == 8


def test_a_generator_that_dies_is_no_hang(metered, upstream):
    async def load():
        with Generator() as own:
            async with served(upstream(ttft_s=0.5)) as url, open_session() as session:
                tools = Instruments(session, own)
                meter = await open_meter(Target("t", url, "m"), Bench(), 3, tools, PROMPTS)
                asyncio.get_running_loop().call_later(0.2, os.kill, own.pid, signal.SIGKILL)
                await meter.full_queue()

    with pytest.raises(TunesmithError, match="generator ended by itself, exit code -9"):
        asyncio.run(load())
