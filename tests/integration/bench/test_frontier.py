"""Models in turns, and the choice between them: made-up evaluations, stand-ins for engines."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console
from upstream import FakeEngine, Upstream, interrupted

from tunesmith.bench import frontier
from tunesmith.bench.choice import cheapest, choose, verdict
from tunesmith.bench.page import write_page
from tunesmith.cli import plan
from tunesmith.config import ModelError, UserError
from tunesmith.config.schema.bench import Bench
from tunesmith.evaluate import command as evaluate
from tunesmith.ledger import Artifact
from tunesmith.pipeline import Stages
from tunesmith.serve.govern.price import find_price

LOSS = {"tuned": 1.0, "w8a8-int8": 1.001, "w4a16": 1.01}
BENCH = {
    "requests": 30,
    "rounds": 2,
    "concurrency": 6,
    "request_rate": 30,
    "max_tokens": 4,
    "variants": list(LOSS),
}


@pytest.fixture
def stages(tmp_path: Path, llama: Path, stages_of: Callable[..., Stages]) -> Stages:
    """Every model a copy of the same, and every evaluation made up."""
    made = stages_of(
        tmp_path,
        llama,
        train={"method": "full"},
        quantize={"scheme": ["w8a8-int8", "w4a16"]},
        evaluate={"variants": list(LOSS)},
        bench=BENCH,
        price={"gpu_hour_usd": 3.6},
    )
    for name, draft in made.variants.items():
        if name == "base":
            continue
        with made.store.write(draft, made.recipe) as work:
            shutil.copytree(llama, work.out, dirs_exist_ok=True)
    for name, loss in LOSS.items():
        own = random.Random(3)
        with made.store.write(made.evaluation(name), made.recipe) as work:
            rows = [
                {
                    "id": str(row),
                    "completion_loss_sum_nats": 20 * loss * own.uniform(0.9, 1.1),
                    "completion_tokens": 20,
                }
                for row in range(40)
            ]
            (work.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_models_take_turns_and_one_is_chosen(
    stages: Stages, engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ids = {name: draft.id for name, draft in stages.variants.items()}
    monkeypatch.setattr(engine, "upstream", Upstream(ttft_s=0.06, tpot_s=0.01))
    monkeypatch.setattr(engine, "refused", (ids["w4a16"],))
    monkeypatch.setattr(engine, "slower", {ids["tuned"]: 1.6})
    assert interrupted(frontier, stages, monkeypatch, rounds=3) == list(LOSS)
    result = frontier.run(stages)
    assert len(engine.order) == 4, "two models, twice; what was measured is kept"
    assert engine.order[:2] == engine.order[2:], "in turns"

    cells = {cell["variant"]: cell for cell in result["cells"]}
    assert cells["w4a16"]["kind"] == "engine" and "no kernel" in cells["w4a16"]["refused"]
    rates = {
        name: cell["output_tokens_per_s"]["value"]
        for name, cell in cells.items()
        if "valid" in cell
    }
    assert rates["w8a8-int8"] == pytest.approx(1.6 * rates["tuned"], rel=0.15)
    change = cells["w8a8-int8"]["loss_change"]
    assert change["value"] == pytest.approx(0.001) and cells["w8a8-int8"]["keeps_quality"]
    assert cells["tuned"]["quality"] == "reference"
    for cell in cells.values():
        assert "refused" in cell or cell["weights_bytes"] > 1000

    text = io.StringIO()
    Console(file=text, width=220).print(frontier.show(result))
    assert "w4a16 is refused (engine): no kernel for it" in text.getvalue()
    page = write_page(stages.store, result["id"], tmp_path / "bench.html").read_text()
    assert "no kernel for it" in page and result["verdict"] in page
    price = find_price(stages, "w8a8-int8")
    if cells["w8a8-int8"]["valid"]:  # a busy machine may rightly be told otherwise
        assert price and price.source == result["id"]
        planned = plan._serving(stages, "w8a8-int8")
        assert planned["sources"] == [result["id"]]
        assert planned["usd_per_million_output_tokens"] == price.output_usd_per_million_tokens
        assert "w8a8-int8 is the cheapest" in result["verdict"]
    assert find_price(stages, "w4a16") is None, "no benchmark for this, rather than a guess"
    unknown = plan._serving(stages, "w4a16")
    assert unknown == {"sources": []}
    Console(file=text, width=220).print(plan._serving_table({"w4a16": unknown}))
    assert "no benchmark of this here" in text.getvalue()


def test_models_under_other_settings_of_the_engine(
    stages: Stages, engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = BENCH | {
        "variants": ["tuned", "w4a16"],
        "rounds": 3,
        "engines": {"narrow": {"max_num_seqs": 2}, "fp8-cache": {"kv_cache_dtype": "fp8"}},
    }
    recipe = stages.recipe.model_copy(update={"bench": Bench.model_validate(bench)})
    stages = Stages(recipe, stages.store)
    monkeypatch.setattr(engine, "upstream", Upstream(ttft_s=0.06, tpot_s=0.01))
    monkeypatch.setattr(engine, "slower", {"max_num_seqs=2 ": 1.6})
    result = frontier.run(stages)
    cells = {cell["variant"]: cell for cell in result["cells"]}
    assert list(cells) == [
        f"{model}{more}"
        for model in ("tuned", "w4a16")
        for more in ("", " · narrow", " · fp8-cache")
    ]
    own, narrow = (
        cells[name]["output_tokens_per_s"]["value"] for name in ("tuned", "tuned · narrow")
    )
    assert own == pytest.approx(1.6 * narrow, rel=0.15)
    assert cells["tuned"]["speed_change"] is None
    slower = cells["tuned · narrow"]["speed_change"]
    assert slower["value"] == pytest.approx(1 / 1.6 - 1, abs=0.1) and slower["high"] < 0
    assert cells["w4a16"]["loss_change"]["value"] == pytest.approx(0.01)
    assert cells["w4a16 · narrow"]["loss_change"] == cells["w4a16"]["loss_change"]
    other = cells["tuned · fp8-cache"]
    assert other["loss_change"] is None, "its quality is not that of the evaluation"
    assert "kv_cache_dtype: auto" in other["quality"] and not other["pareto"]
    price = find_price(stages, "tuned")
    known = cells["tuned"]["usd_per_million_output_tokens"]
    assert price is None or price.output_usd_per_million_tokens == known, "of its own settings"


def test_all_that_it_compares_is_evaluated(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(stages: Stages, name: str) -> Artifact:
        measured.append(name)
        return stages.made(stages.evaluation("tuned"))

    monkeypatch.setattr(evaluate, "measure_variant", measure)
    found = evaluate.run(stages, ("base", "tuned"))
    assert measured == ["base"] and found["reused"] == ["tuned"], "evaluate.variants has no base"


def test_other_settings_have_names_and_change_something() -> None:
    with pytest.raises(ValidationError, match=r"'a/b': names are letters"):
        Bench.model_validate({"engines": {"a/b": {"max_num_seqs": 2}}})
    with pytest.raises(ValidationError, match=r"engines\.same changes nothing"):
        Bench.model_validate({"engines": {"same": {}}})


def test_a_frontier_needs_a_price_and_a_model_that_runs(
    stages: Stages, engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = Stages(stages.recipe.model_copy(update={"price": None}), stages.store)
    with pytest.raises(UserError, match="needs a price"):
        frontier.run(free)
    monkeypatch.setattr(engine, "refused", ("",))
    with pytest.raises(ModelError, match="no model of .* runs here: no kernel"):
        frontier.run(stages)


def cell(name: str, loss: float, usd: float, *, valid: bool = True, slo: bool = True) -> Any:
    return {
        "variant": name,
        "valid": valid,
        "loss_change": {"value": loss, "low": loss - 0.001, "high": loss + 0.001},
        "usd_per_million_output_tokens": usd,
        "goodput": {"slo_kept": slo},
    }


def test_the_pareto_set_has_what_nothing_beats() -> None:
    cells = [
        cell("bf16", 0.0, 4.0),
        cell("int8", 0.002, 2.0),
        cell("int8-slow", 0.002, 3.0),
        cell("int4", 0.018, 1.0),
        cell("int3", 0.05, 0.9),
        cell("late", 0.001, 0.5, slo=False),
        cell("doubtful", -0.1, 0.1, valid=False),
        {"variant": "gone", "refused": "no kernel", "kind": "engine"},
    ]
    chosen = choose(cells, most_loss=0.02)
    assert [one["variant"] for one in chosen if one["pareto"]] == ["bf16", "late"]
    without = choose([one for one in cells if one["variant"] != "late"], most_loss=0.02)
    front = [one["variant"] for one in without if one["pareto"]]
    assert front == ["bf16", "int8", "int4", "int3"]
    best = cheapest(chosen)
    assert best and best["variant"] == "int4", "with all of its interval below the limit"
    assert "int4 is the cheapest" in verdict(chosen)
    assert cheapest(choose(cells, most_loss=-1.0)) is None
    assert "No model keeps" in verdict(choose(cells, most_loss=-1.0))
    noisy = [one | {"valid": False} for one in cells[:3]] + cells[5:6]
    assert "bf16, int8, int8-slow: quality and promise are kept, by runs that are INVALID" in (
        verdict(choose(noisy, most_loss=0.02))
    )
    free = [one | {"usd_per_million_output_tokens": None} for one in cells[:2]]
    assert "kept, without a price in the recipe" in verdict(choose(free, most_loss=0.02))
