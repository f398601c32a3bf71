"""The whole of `tunesmith bench` on the real engine: what it says adds up, and it is done once."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.bench import command, compare, rig
from tunesmith.config import ModelError, UserError
from tunesmith.pipeline import Stages

BENCH = {"requests": 48, "concurrency": 12, "request_rate": 24, "max_tokens": 12}
# What a busy or a fast machine may rightly be told.
NOISE = {"client_bound", "too_short", "noisy_machine"}


@pytest.fixture(scope="module")
def stages(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, stages_of: Callable[..., Stages]
) -> Stages:
    return stages_of(
        tmp_path_factory.mktemp("benched"),
        llama,
        bench=BENCH,
        price={"gpu_hour_usd": 3.6},
        engine={"max_model_len": 256, "max_num_seqs": 16, "kv_cache_gib": 0.25},
    )


class ClockedServer(rig.EngineServer):
    """An engine whose life is timed by another clock than the bill's."""

    lives_s: list[float] = []

    def __enter__(self) -> rig.EngineServer:
        self._entered_s = time.time()
        return super().__enter__()

    def __exit__(self, *ending: Any) -> None:
        super().__exit__(*ending)
        self.lives_s.append(time.time() - self._entered_s)


@pytest.fixture(scope="module")
def result(stages: Stages) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig, "EngineServer", ClockedServer)
        return command.run(stages, "all")


@pytest.mark.parametrize("mode", command.MODES)
def test_figures_are_true(stages: Stages, result: dict[str, Any], mode: str) -> None:
    figures = result["modes"][mode]["variants"]["base"]
    assert {fault["check"] for fault in figures["faults"]} <= NOISE, figures["faults"]
    assert (figures["requests"], figures["failed"], figures["output_tokens"]) == (96, 0, 12)
    assert figures["cache_hit_rate"] < 0.01
    roof = figures["roofline"]
    assert roof["memory"] > 0 and roof["compute"] > 0, "the engine counts its passes"
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        p50, p95 = (figures[name][percent] for percent in ("p50", "p95"))
        assert 0 < p50["low"] <= p50["value"] <= p50["high"]
        assert p50["value"] <= p95["value"]
    e2e_ms = figures["ttft_ms"]["p50"]["value"] + 11 * figures["tpot_ms"]["p50"]["value"]
    assert figures["e2e_ms"]["p50"]["value"] == pytest.approx(e2e_ms, rel=0.5)
    per_second_usd = (
        figures["input_tokens_per_s"] * figures["usd_per_million_input_tokens"]
        + figures["output_tokens_per_s"]["value"] * figures["usd_per_million_output_tokens"]
    ) / 1e6
    assert per_second_usd == pytest.approx(0.001)


@pytest.mark.parametrize("mode", command.MODES)
def test_every_sample_is_kept(stages: Stages, result: dict[str, Any], mode: str) -> None:
    artifact = stages.made(stages.bench(mode))
    assert stages.store.faults(artifact) == []
    assert set(artifact.manifest.parents) == {"base", "data"}
    found = json.loads((artifact.root / "bench.json").read_text())
    entry = found["variants"]["base"]
    assert [sample["index"] for sample in entry["samples"]] == [*range(48)] * 2
    assert [sample["round"] for sample in entry["samples"]] == [0] * 48 + [1] * 48
    assert {sum(sample["piece_tokens"]) for sample in entry["samples"]} == {12}
    assert found["environment"]["versions"]
    billed_s = sum(line["seconds"] for line in entry["bill"])
    assert sum(line["usd"] for line in entry["bill"]) == pytest.approx(billed_s * 0.001)
    # Both artifacts came of the same engine start, and share what it took.
    both_s = sum(
        stages.made(stages.bench(name)).manifest.cost.device_seconds for name in command.MODES
    )
    assert both_s == pytest.approx(billed_s, rel=0.1, abs=15)


def test_costs_add_up(stages: Stages, result: dict[str, Any]) -> None:
    """Per-request costs, idle time and loading are what the machine cost by the clock."""
    artifacts = {mode: stages.made(stages.bench(mode)) for mode in command.MODES}
    found = {
        mode: json.loads((artifact.root / "bench.json").read_text())["variants"]["base"]
        for mode, artifact in artifacts.items()
    }
    lines = {line["name"]: line for line in found["serve"]["bill"]}
    each_usd = sum(sample["usd"] for sample in found["serve"]["samples"])
    assert each_usd <= lines["arrivals"]["usd"] * 1.000001, "what was discarded is paid for too"
    if not found["serve"]["figures"]["discarded"]:
        assert each_usd == pytest.approx(lines["arrivals"]["usd"], rel=1e-6)
    assert all(line["seconds"] >= 0 for line in lines.values())
    total_usd = sum(line["usd"] for line in lines.values())
    [life_s] = ClockedServer.lives_s
    assert total_usd == pytest.approx(life_s * 0.001, rel=1e-3)
    # The artifacts' own clock also runs while prompts are read and the ceiling is measured.
    clock_s = sum(artifact.manifest.cost.device_seconds for artifact in artifacts.values())
    assert total_usd <= clock_s * 0.001 < total_usd + 30 * 0.001


def test_a_full_queue_keeps_its_concurrency(stages: Stages, result: dict[str, Any]) -> None:
    artifact = stages.made(stages.bench("batch"))
    samples = json.loads((artifact.root / "bench.json").read_text())["variants"]["base"]["samples"]
    for sample in samples[:48]:
        in_flight = sum(s["sent_s"] <= sample["sent_s"] < s["ended_s"] for s in samples[:48])
        assert in_flight <= 12


def test_what_is_measured_is_not_measured_again(
    stages: Stages, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig, "EngineServer", None)
    assert command.run(stages, "all") == result
    assert command.run(stages, "serve")["modes"]["serve"] == result["modes"]["serve"]


def test_an_interrupted_bench_keeps_the_variants_it_has(
    stages: Stages, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = stages.recipe.model_copy(
        update={"bench": stages.recipe.bench.model_copy(update={"request_rate": 25.0})}
    )
    changed = Stages(section, stages.store)
    made = stages.made(stages.bench("serve")).root / "bench.json"
    entry = json.loads(made.read_text())["variants"]["base"]
    write = changed.store.write(changed.bench("serve"), section)
    with pytest.raises(KeyboardInterrupt), write as work:
        (work.scratch / "base.json").write_text(json.dumps(entry))
        raise KeyboardInterrupt
    monkeypatch.setattr(rig, "EngineServer", None)
    monkeypatch.setattr(rig, "measure_ceiling", lambda: None)
    found = command.run(changed, "serve")["modes"]["serve"]
    assert found["id"] != result["modes"]["serve"]["id"]
    assert found["variants"]["base"] == entry["figures"]


def test_a_run_is_not_told_from_itself(stages: Stages, result: dict[str, Any]) -> None:
    for mode in command.MODES:
        (found,) = compare.run(stages.store, *[result["modes"][mode]["id"]] * 2)["comparisons"]
        assert found["verdict"] in ("no difference shown", "invalid")
        assert found["changes"][found["judged"]]["value"] == 0
    with pytest.raises(UserError, match="bench batch"):
        compare.run(stages.store, *(result["modes"][mode]["id"] for mode in command.MODES))


class Refusing:
    """An engine that does not have what the model needs."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> None:
        raise ModelError("no kernel for it")

    def __exit__(self, *_: object) -> None: ...


def test_a_model_that_the_engine_refuses(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = stages.recipe.bench.model_copy(update={"request_rate": 26.0})
    changed = Stages(stages.recipe.model_copy(update={"bench": bench}), stages.store)
    monkeypatch.setattr(rig, "EngineServer", Refusing)
    monkeypatch.setattr(rig, "measure_ceiling", lambda: None)
    with pytest.raises(ModelError, match="no kernel for it"):
        command.run(changed, "serve")
    assert stages.store.find(changed.bench("serve").id) is None


def test_the_table_names_what_is_doubtful(result: dict[str, Any]) -> None:
    doubtful = json.loads(json.dumps(result))
    figures = doubtful["modes"]["serve"]["variants"]["base"]
    figures |= {"valid": False, "faults": [{"check": "errors", "detail": "3 of 48 failed [/b]"}]}
    text = io.StringIO()
    doubtful["modes"]["batch"]["variants"]["w4a16"] = {"refused": "no kernel"}
    Console(file=text, width=160).print(command.show(doubtful))
    assert "w4a16 cannot run here: no kernel" in text.getvalue()
    assert "base is INVALID: errors: 3 of 48 failed [/b]" in text.getvalue()
    assert "bench batch" in text.getvalue() and "goodput" in text.getvalue()
