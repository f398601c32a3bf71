"""Engine settings in turns, on stand-ins whose speed hangs on what they are given."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from upstream import FakeEngine, Upstream, interrupted

from tunesmith.bench import settings
from tunesmith.bench.page import write_page
from tunesmith.config import ModelError, UserError
from tunesmith.config.schema.bench import Settings
from tunesmith.pipeline import Stages

BENCH = {
    "requests": 30,
    "rounds": 3,
    "concurrency": 6,
    "request_rate": 60,
    "max_tokens": 4,
    "prompts": "synthetic",
    "lengths": [{"input_tokens": 20, "output_tokens": 4}],
}


@pytest.fixture
def stages_with(
    tmp_path: Path, llama: Path, stages_of: Callable[..., Stages]
) -> Callable[..., Stages]:
    return lambda **bench: stages_of(
        tmp_path, llama, train=None, bench=BENCH | bench, engine={"max_num_seqs": 8}
    )


def test_what_matters_is_found_and_taken(
    stages_with: Callable[..., Stages],
    engine: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(engine, "upstream", Upstream(ttft_s=0.06, tpot_s=0.01))
    monkeypatch.setattr(engine, "slower", {"max_num_seqs=8 ": 1.6})
    monkeypatch.setattr(engine, "refused", ("kv_cache_dtype='fp8'",))
    stages = stages_with(settings={"max_num_seqs": [8, 32], "kv_cache_dtype": ["fp8"]})
    interrupted(settings, stages, monkeypatch, rounds=5)
    result = settings.run(stages)
    # One key with two values, and one whose other value never starts, in three rounds.
    assert engine.starts == 2 * 3 + 3, "what was measured is kept"

    steps = {step["key"]: step for step in result["steps"]}
    seqs = steps["max_num_seqs"]
    assert [entry["value"] for entry in seqs["tried"]] == [8, 32]
    # A machine that is busy with something else may rightly be told apart from itself.
    if all(entry["valid"] for entry in seqs["tried"]):
        assert seqs["tried"][1]["verdict"] == "faster" and seqs["best"] == 32
        assert seqs["tried"][1]["change"]["value"] == pytest.approx(0.6, abs=0.15)
        assert result["best"]["max_num_seqs"] == 32
        assert "max_num_seqs: 32" in settings.advice(result)
    assert steps["kv_cache_dtype"]["best"] == "auto"
    assert "no kernel" in steps["kv_cache_dtype"]["tried"][1]["refused"]

    text = io.StringIO()
    Console(file=text, width=220).print(settings.show(result))
    assert "kv_cache_dtype: fp8 cannot run here: no kernel for it" in text.getvalue()
    page = write_page(stages.store, result["id"], tmp_path / "bench.html").read_text()
    assert "kv_cache_dtype" in page and "no kernel for it" in page
    assert settings.run(stages)["id"] == result["id"] and engine.starts == 9


def test_what_the_budget_has_no_time_for_is_said(
    stages_with: Callable[..., Stages], engine: type[FakeEngine]
) -> None:
    stages = stages_with(
        settings={"max_num_seqs": [16], "enable_chunked_prefill": [False]}, rounds=1, search_s=0.5
    )
    first, second = settings.run(stages)["steps"]
    assert len(first["tried"]) == 2, "the first key has no estimate yet"
    assert not second["tried"] and "bench.search_s" in second["skipped"]
    assert second["best"] is True


def test_there_must_be_something_to_try_that_starts(
    stages_with: Callable[..., Stages], engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "refused", ("max_num_seqs=8 ",))
    stages = stages_with(settings={"max_num_seqs": [16]})
    with pytest.raises(ModelError, match="no kernel for it"):
        settings.run(stages)
    assert stages.recipe.bench
    idle = stages.recipe.bench.model_copy(update={"settings": Settings()})
    with pytest.raises(UserError, match="needs values to try in bench.settings"):
        settings.run(Stages(stages.recipe.model_copy(update={"bench": idle}), stages.store))
