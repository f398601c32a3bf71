"""Rates, goodput, idle time and cost of samples that were made by hand."""

from __future__ import annotations

import pytest

from tunesmith.bench.bill import bill, shares_s
from tunesmith.bench.client import Recording, Sample
from tunesmith.bench.cost import input_share, token_costs
from tunesmith.bench.counters import Counters
from tunesmith.bench.figures import (
    Window,
    arrivals_window,
    full_queue_window,
    goodput,
    idle_s,
    latencies_ms,
    throughput,
)
from tunesmith.config.schema.bench import Slo
from tunesmith.statistics import percentile


def sample(index, intended_s, *, ttft_s=0.1, tpot_s=0.1, tokens=11, error=None, sent_s=None):
    pieces = tuple(intended_s + ttft_s + tpot_s * n for n in range(tokens))
    return Sample(
        index=index,
        intended_s=intended_s,
        sent_s=intended_s if sent_s is None else sent_s,
        ended_s=pieces[-1],
        piece_s=pieces,
        piece_tokens=(1,) * tokens,
        input_tokens=100,
        output_tokens=tokens,
        finish_reason="length",
        error=error,
    )


def waves(concurrency=4, count=10, request_s=1.1):
    """A closed loop in lockstep: `count` waves of `concurrency` requests."""
    return [
        sample(wave * concurrency + place, wave * request_s)
        for wave in range(count)
        for place in range(concurrency)
    ]


def test_latencies_count_from_the_intended_start():
    late = [sample(n, n * 1.0, sent_s=n * 1.0 + 0.05) for n in range(20)]
    found = latencies_ms(late, seed=0)
    assert found["ttft_ms"]["p50"].value == pytest.approx(100)
    assert found["tpot_ms"]["p95"].value == pytest.approx(100)
    assert found["e2e_ms"]["p50"].value == pytest.approx(1100)
    assert "p99" not in found["e2e_ms"]  # of 20 requests


def test_gaps_between_pieces_are_counted_over_all_answers():
    """One answer in ten stalls once for a second: 1 % of all gaps, whatever the means say."""
    smooth = [sample(n, float(n)) for n in range(9)]
    pieces = tuple(0.1 * n + (1.0 if n > 5 else 0.0) for n in range(11))
    stalled = Sample(9, 0.0, 0.0, 2.0, pieces, (1,) * 11, 9, 11, "length", None)
    found = latencies_ms([*smooth, stalled] * 2, seed=0)["itl_ms"]
    assert found["p50"].value == pytest.approx(100)
    assert found["p99"].value == pytest.approx(100)
    assert found["p99"].high == pytest.approx(1100), "another run could have had two"
    assert stalled.itl_s[5] == pytest.approx(1.1)


def test_waiting_times_have_wider_intervals_than_independent_ones():
    """A queue that comes and goes says less than as many requests apart."""
    queue = [sample(n, float(n), ttft_s=0.1 + (0.4 if n // 20 % 2 else 0.0)) for n in range(200)]
    drawn_one_by_one = percentile([s.ttft_s * 1000 for s in queue], 50, block=1)
    found = latencies_ms(queue, seed=0)["ttft_ms"]["p50"]
    assert found.high - found.low >= drawn_one_by_one.high - drawn_one_by_one.low


def test_tpot_leaves_the_first_piece_out():
    burst = Sample(0, 0.0, 0.0, 1.0, (0.2, 0.6, 1.0), (4, 4, 4), 9, 12, "length", None)
    assert burst.tpot_s == pytest.approx(0.1)
    at_once = Sample(0, 0.0, 0.0, 1.0, (1.0,), (12,), 9, 12, "length", None)
    assert at_once.tpot_s is None


def test_throughput_of_a_full_queue_is_exact_and_blind_to_its_ramp():
    samples = waves()
    window = full_queue_window(samples, 4)
    assert window == (0.0, pytest.approx(11.0))
    rates = throughput([(samples, window)], seed=0)
    assert rates.output_tokens_per_s.value == pytest.approx(40, rel=0.03)
    assert rates.requests_per_s == pytest.approx(4 / 1.1, rel=0.03)
    assert rates.input_tokens_per_s == pytest.approx(400 / 1.1, rel=0.03)
    # One request that goes on alone for as long again halves a naive rate, and nothing here.
    straggler = sample(40, 11.0, tpot_s=1.1)
    window = full_queue_window([*samples, straggler], 4)
    assert window.end_s < 23
    alone = throughput([([*samples, straggler], full_queue_window(samples, 4))], seed=0)
    assert alone.output_tokens_per_s.value == pytest.approx(40, rel=0.03)


def test_a_queue_that_was_never_full_has_no_window():
    assert full_queue_window(waves(count=1)[:3], 4).length_s == 0
    assert throughput([(waves(), Window(0.0, 0.0))], seed=0) is None


def test_arrivals_window_leaves_the_filling_and_the_draining_out():
    samples = [sample(n, n * 0.5) for n in range(41)]
    window = arrivals_window(samples)
    assert window == (pytest.approx(1.1), 20.0)
    rates = throughput([(samples, window)], seed=0)
    assert rates.requests_per_s == pytest.approx(2.0, rel=0.02)


def test_failures_are_misses():
    slo = Slo(ttft_p95_ms=150, tpot_p95_ms=150)
    kept = [sample(n, float(n)) for n in range(18)]
    broken = [sample(18, 18.0, ttft_s=0.2), sample(19, 19.0, error="gone")]
    found = goodput([kept + broken], slo)
    assert found.share == 0.9
    assert found.requests_per_s == pytest.approx(18 / 20.1)
    assert not found.slo_kept
    assert goodput([kept], slo).slo_kept
    assert goodput([[*kept, sample(18, 18.0, ttft_s=0.2)]], slo).slo_kept is False
    assert goodput([kept, [*kept, broken[0]]], slo).slo_kept


def test_idle_time_is_what_no_request_covers():
    assert idle_s([sample(0, 0.0), sample(1, 0.5), sample(2, 5.0)]) == pytest.approx(5.0 - 1.6)


def test_token_prices_add_up_to_the_price_of_the_machine():
    samples = waves()
    rates = throughput([(samples, full_queue_window(samples, 4))], seed=0)
    costs = token_costs(3.6, rates, input_share(read_s=2.0, whole_s=10.0))
    per_second = (
        rates.input_tokens_per_s * costs.usd_per_million_input_tokens
        + rates.output_tokens_per_s.value * costs.usd_per_million_output_tokens
    ) / 1e6
    assert per_second == pytest.approx(3.6 / 3600, rel=1e-9)
    assert costs.usd_per_million_input_tokens * rates.input_tokens_per_s / 1e6 == pytest.approx(
        0.2 * 3.6 / 3600
    )
    assert costs.usd_per_request * rates.requests_per_s == pytest.approx(3.6 / 3600)
    assert token_costs(None, rates, 0.2) is None


def test_requests_share_the_machine_while_they_overlap():
    """Two seconds each: alone for one, together for one; then nothing, then one alone."""
    samples = [
        sample(0, 0.0, tokens=20),  # ends at 2.0
        sample(1, 1.0, tokens=20),
        sample(2, 5.0, tokens=20),
    ]
    assert shares_s(samples) == pytest.approx([1.5, 1.5, 2.0])
    assert sum(shares_s(waves())) == pytest.approx(11.0), "busy all the time"


def test_a_bill_adds_up_to_wall_time():
    samples = waves()
    lines = bill(7.2, 100.0, 30.0, {"full queue": sum(shares_s(samples))})
    assert {line.name: line.seconds for line in lines}["idle"] == pytest.approx(59.0)
    assert sum(line.usd for line in lines) == pytest.approx(100 / 3600 * 7.2, rel=1e-9)
    assert bill(None, 10.0, 1.0, {})[0].usd is None


def test_a_stream_cut_anywhere_reads_the_same():
    stream = (
        b'data: {"choices":[{"delta":{"content":""}}],"usage":{"completion_tokens":0}}\n\n'
        b'data: {"choices":[{"delta":{"content":"\xc3\xa4"}}],"usage":'
        b'{"completion_tokens":2}}\r\n\r\n'
        b": a comment\n\n"
        b'data: {"choices":[{"finish_reason":"length"}],"usage":{"completion_tokens":3}}\n\n'
        b'data: {"choices":[],"usage":{"completion_tokens":3,"prompt_tokens":7}}\n\n'
        b"data: [DONE]\n\n"
    )
    for step in (1, 7, len(stream)):
        recording = Recording()
        for start in range(0, len(stream), step):
            recording.feed(stream[start : start + step], float(start))
        assert recording.piece_tokens == [2, 1]
        assert recording.fault() is None
        assert recording.usage == {"completion_tokens": 3, "prompt_tokens": 7}


def test_counters_add_engines_up_and_want_all():
    text = "\n".join(
        f'vllm:{name}_total{{engine="{engine}",model_name="m"}} {engine + 1}.0'
        for name in (
            "prompt_tokens",
            "generation_tokens",
            "prefix_cache_queries",
            "prefix_cache_hits",
            "num_preemptions",
        )
        for engine in (0, 1)
    )
    assert Counters.parse(text).prompt_tokens == 3
    assert (Counters.parse(text) - Counters.parse(text)).hit_rate == 0
    with pytest.raises(ValueError, match="publishes no generation_tokens"):
        Counters.parse(text.replace("generation", "g"))
