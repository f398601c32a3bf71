"""Money and ceilings, by hand-made figures: what adds up, and when an API is cheaper."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict

import pytest

from tunesmith.bench.ceiling import Ceiling, measure_ceiling
from tunesmith.bench.client import Sample
from tunesmith.bench.counters import Counters
from tunesmith.bench.economics import Capacity, economics
from tunesmith.bench.energy import EnergyMeter, open_energy
from tunesmith.bench.figures import Window
from tunesmith.bench.roofline import Shape, read_shape, roofline
from tunesmith.bench.validity import Evidence
from tunesmith.bench.worth import sentence
from tunesmith.config.schema.bench import Bench

API = {"input_usd_per_million_tokens": 0.5, "output_usd_per_million_tokens": 1.5}
CAPACITY = Capacity(requests_per_s=2.0, accepted_share=0.8, input_tokens=1000, output_tokens=500)


def test_what_a_request_costs_beside_an_api():
    found = economics(Bench(api_price=API, lifetime_requests=10_000), 3.6, CAPACITY, 25.0)
    assert found.usd_per_request == pytest.approx(3.6 / 7200)
    assert found.usd_per_accepted_request == pytest.approx(3.6 / 7200 / 0.8)
    assert found.made_usd_per_request == pytest.approx(0.0025)
    assert found.api_usd_per_request == pytest.approx(0.00125)
    assert found.break_even_requests_per_hour == pytest.approx(3.6 / 0.00125)
    assert found.payback_requests == pytest.approx(25 / (0.00125 - 0.0005))
    assert found.engines is found.hour_usd is found.api_hour_usd is None


def test_traffic_decides_how_many_engines_are_paid_for():
    bench = Bench(api_price=API, requests_per_hour=10_000)
    found = economics(bench, 3.6, CAPACITY, 26.5)
    assert (found.engines, found.hour_usd) == (2, 7.2)
    assert found.api_hour_usd == pytest.approx(12.5)
    assert found.payback_requests == pytest.approx(26.5 / (5.3 / 10_000)), "what is saved, of it"


def test_it_is_said_in_a_sentence():
    bench = Bench(api_price=API, requests_per_hour=10_000, lifetime_requests=10_000)
    text = sentence("tuned", asdict(economics(bench, 3.6, CAPACITY, 25.0)))
    assert text == (
        "tuned: USD 0.0005 a request, USD 0.000625 one within the promise, USD 0.0025 more for its "
        "making; the API asks USD 0.00125: one engine is cheaper above 2,880 an hour; the expected "
        "traffic takes 2 for USD 7.2 an hour, USD 12.5 at the API; its making is paid back after "
        "47,170 requests."
    )
    dear = sentence("tuned", asdict(economics(Bench(api_price=API), 36.0, CAPACITY, None)))
    assert dear.endswith("is cheaper at any traffic that one engine can answer.")


def test_an_engine_that_is_dearer_at_its_best_never_breaks_even():
    found = economics(Bench(api_price=API), 36.0, CAPACITY, 25.0)
    assert found.break_even_requests_per_hour is found.payback_requests is None
    alone = economics(Bench(), 3.6, CAPACITY, None)
    assert alone.api_usd_per_request is alone.made_usd is alone.payback_requests is None


def answer(inputs=100, outputs=11):
    pieces = tuple(0.1 * n for n in range(outputs))
    return Sample(0, 0.0, 0.0, 1.0, pieces, (1,) * outputs, inputs, outputs, "length", None)


def evidence(samples, steps, wall_s=1.0):
    counted = Counters(0, 0, 0, 0, 0, steps=steps)
    return Evidence(samples, counted, 0, (), 0.1, Window(0, 1), wall_s=wall_s)


def test_a_pass_that_takes_as_long_as_its_bytes_is_at_the_roof():
    """Eleven passes over 1 GB of weights and the keys of ten decoded tokens at 11.01… GB/s."""
    shape = Shape(
        pass_bytes=10**9,
        kv_bytes_per_token=10**4,
        matrix_parameters=5 * 10**8,
        layers=10,
        attention_width=100,
    )
    kept = sum(100 + n for n in range(1, 11))
    moved_gb = 11 + kept * 10**4 / 1e9
    operations = 2 * 110 * 5e8 + 4 * (110 * 111 / 2) * 10 * 100
    found = roofline(evidence([answer()], 11), shape, Ceiling(moved_gb, operations / 1e12 * 4))
    assert found.memory == pytest.approx(1.0)
    assert found.compute == pytest.approx(0.25)
    assert found.share == found.memory
    assert roofline(evidence([answer()], 0), shape, Ceiling(1, 1)) is None


def tensors(path, **shapes):
    header, at = {}, 0
    for name, size in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def test_the_shape_of_a_model_is_read_from_its_folder(tmp_path):
    config = {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 3, "intermediate_size": 128, "vocab_size": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {"model.embed_tokens.weight": 128_000, "lm_head.weight": 128_000, "rest": 5_000}
    tensors(tmp_path / "model.safetensors", **weights)
    found = read_shape(tmp_path, "bfloat16")
    assert found.pass_bytes == 133_000, "of an embedding one row is read"
    assert found.kv_bytes_per_token == 2 * 3 * 2 * 16 * 2
    assert found.matrix_parameters == 3 * (64 * 16 * 12 + 3 * 64 * 128) + 64_000
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert read_shape(tmp_path, "bfloat16").pass_bytes == 261_000
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts": 8}))
    assert read_shape(tmp_path, "bfloat16") is None
    assert read_shape(tmp_path / "nothing", "bfloat16") is None


def test_the_ceiling_is_measured():
    found = measure_ceiling()
    assert found.memory_gb_per_s > 0.5 and found.matmul_tflops > 0.001


class Nvml:
    """A driver with two GPUs."""

    class NVMLError(Exception): ...

    def __init__(self, fails=False):
        self.fails = fails

    def nvmlInit(self):
        if self.fails:
            raise self.NVMLError

    def nvmlShutdown(self): ...

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, name):
        return {"GPU-b": 1}[name]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return 1000 * (10 + handle)


@pytest.mark.parametrize(
    ("visible", "devices", "joules"),
    [(None, 1, 10), (None, 2, 21), ("1", 1, 11), ("GPU-b", 1, 11), ("", 1, None)],
)
def test_energy_is_read_of_the_gpus_that_the_engine_holds(monkeypatch, visible, devices, joules):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with open_energy(devices) as meter:
        assert meter.joules() == joules


def test_without_a_driver_there_is_no_energy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml(fails=True))
    with open_energy() as meter:
        assert meter.joules() is None
    assert EnergyMeter().joules() is None
