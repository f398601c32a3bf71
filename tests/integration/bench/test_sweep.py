"""A sweep of a server whose capacity is known, interrupted and gone on with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from upstream import FakeEngine, Upstream

from tunesmith.bench import rig, sweep
from tunesmith.bench.measure import Meter
from tunesmith.bench.page import write_page
from tunesmith.config import ModelError
from tunesmith.pipeline import Stages

SERVICE_S = 0.02
BENCH = {
    "requests": 30,
    "rounds": 2,
    "concurrency": 4,
    "max_tokens": 1,
    "rates": [25, 200],
    "concurrencies": [1, 2],
    "slo": {"ttft_p95_ms": 150},
    "search_tolerance": 0.5,
}


@pytest.fixture(autouse=True)
def one_server(engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "upstream", Upstream(ttft_s=SERVICE_S, one_at_a_time=True))
    monkeypatch.setattr(sweep, "LEAST_S", 1.0)


@pytest.fixture
def stages(tmp_path: Path, llama: Path, stages_of: Callable[..., Stages]) -> Stages:
    return stages_of(tmp_path, llama, bench=BENCH, price={"gpu_hour_usd": 3.6})


def test_the_highest_rate_that_keeps_the_promise(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One server of 20 ms takes fifty requests a second, and keeps 150 ms somewhat below."""
    loads: list[str] = []
    measure = Meter._phase

    async def stopping(self: Meter, name: str, *args: Any, **options: Any) -> Any:
        loads.append(name)
        if len(loads) == 6:  # after a warm-up, saturation's two, one and two in flight
            raise KeyboardInterrupt
        return await measure(self, name, *args, **options)

    monkeypatch.setattr(Meter, "_phase", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(stages)
    kept = json.loads(next(stages.store.folder.glob("work/*/scratch/base.points.json")).read_text())
    assert list(kept) == ["saturation", "concurrency 1", "concurrency 2"]

    monkeypatch.setattr(Meter, "_phase", measure)
    result = sweep.run(stages)
    found = result["variants"]["base"]
    for name, point in zip(kept, [found["saturation"], *found["concurrencies"]], strict=True):
        assert point["seconds"] == kept[name]["seconds"], "what was measured is kept"
    capacity = 1 / SERVICE_S
    assert found["saturation"]["figures"]["requests_per_s"] == pytest.approx(capacity, rel=0.1)
    kept_rates = {point["request_rate"]: sweep.keeps(point) for point in found["rates"]}
    assert kept_rates[25] and not kept_rates[200]
    assert 0.4 * capacity < found["best"]["request_rate"] < 1.3 * capacity
    assert found["best"]["figures"]["rounds"] == 2
    # A busy machine sells its tokens cheaper than one that waits for requests.
    costs = [point["figures"]["usd_per_request"] for point in (found["saturation"], found["best"])]
    assert costs[0] == pytest.approx(0.001 * SERVICE_S, rel=0.1) and costs[1] > 0.9 * costs[0]

    artifact = stages.store.get(result["id"])
    whole = json.loads((artifact.root / "bench.json").read_text())["variants"]["base"]
    assert len(whole["rates"][0]["samples"]) >= 30
    monkeypatch.setattr(rig, "EngineServer", None)
    assert sweep.run(stages) == result
    page = write_page(stages.store, result["id"], tmp_path / "bench.html").read_text()
    assert "Latency against rate, base" in page and len(page) < 3_000_000
    text = io.StringIO()
    Console(file=text, width=200).print(sweep.show(result))
    assert "At saturation, base: USD 2" in text.getvalue()
    assert "requests/s is the most that keeps the promise" in text.getvalue()


def test_a_search_ends_with_its_time(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"search_s": 0.5, "rates": (), "concurrencies": (), "rounds": 1}
    bench = stages.recipe.bench.model_copy(update=section)
    changed = Stages(stages.recipe.model_copy(update={"bench": bench}), stages.store)
    found = sweep.run(changed)["variants"]["base"]
    assert found["search"] == "out of time" and found["best"] is None
    monkeypatch.setattr(FakeEngine, "refused", ("",))
    other = bench.model_copy(update={"requests": 31})
    refused = Stages(stages.recipe.model_copy(update={"bench": other}), stages.store)
    with pytest.raises(ModelError, match="no kernel"):
        sweep.run(refused)
