"""`scheme: auto` in the real engine: what it picks is what trying everything would pick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from taught import teach

from tunesmith.config import GateError, UserError
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import summary_of
from tunesmith.quantize.command import run, show

NAMES = ("w4a16", "w8a8-int8")


@pytest.fixture(scope="module")
def named(
    tmp_path_factory: pytest.TempPathFactory,
    model_of: Callable[..., Path],
    rows: list[dict[str, Any]],
    stages_of: Callable[..., Stages],
) -> Stages:
    """Every candidate made and measured, with no limit."""
    folder = tmp_path_factory.mktemp("search")
    base = model_of(folder / "base", "llama")
    teach(base, rows[:48])
    stages = stages_of(
        folder,
        base,
        quantize={
            "scheme": NAMES,
            "calibration_rows": 24,
            "verify_rows": 12,
            "max_loss_increase": None,
            "max_kl": None,
        },
        engine={"max_model_len": 256, "max_num_seqs": 8, "kv_cache_gib": 0.25},
    )
    run(stages)
    return stages


def auto(named: Stages, **changes: Any) -> Stages:
    quantize = named.recipe.quantize
    assert quantize
    search = quantize.search.model_copy(update={"candidates": NAMES, **changes.pop("search", {})})
    chosen = quantize.model_copy(update={"scheme": "auto", "search": search, **changes})
    return Stages(named.recipe.model_copy(update={"quantize": chosen}), named.store)


def divergence(named: Stages, name: str) -> float:
    metrics = summary_of(named)[name]["metrics"]
    return float(metrics["total"]["kl"]["high"])


def test_it_takes_the_smallest_within_the_limits_and_measures_nothing_twice(
    named: Stages,
) -> None:
    result = run(auto(named, max_kl=2 * divergence(named, "w4a16")))
    made = result["checkpoints"]["auto"]
    assert made["chosen"] == "w4a16" and [one["name"] for one in made["search"]] == ["w4a16"]
    assert made["chosen_id"] == named.quantized("w4a16").id
    assert result["fidelity"]["auto"]["state"] == "approved"
    assert result["fidelity"]["auto"]["id"] == named.fidelity("w4a16").id
    assert Path(made["folder"]) == named.made(named.quantized("w4a16")).root
    _, faults = named.store.verify(made["id"])
    assert faults == []
    show(result)


def test_where_the_smallest_fails_it_mixes_and_never_beyond_what_passes(named: Stages) -> None:
    between = (divergence(named, "w4a16") + divergence(named, "w8a8-int8")) / 2
    stages = auto(named, max_kl=between)
    made = run(stages)["checkpoints"]["auto"]
    names = [one["name"] for one in made["search"]]
    assert names[:2] == ["w4a16", "w8a8-int8"] and len(names) > 2
    sizes = {one["name"]: one["bytes"] for one in made["search"]}
    assert all(sizes[name] < sizes["w8a8-int8"] for name in names[2:])
    approved = [one for one in made["search"] if one["state"] == "approved"]
    assert made["bytes"] == min(one["bytes"] for one in approved)
    mixed = next(one for one in made["search"] if one["keep"])
    kept = named.store.get(mixed["id"]).manifest.metrics["kept"]
    assert all(any(name.startswith(f"{block}.") for name in kept) for block in mixed["keep"])


def test_the_nearest_and_what_is_too_large(named: Stages) -> None:
    nearest = run(auto(named, search={"minimize": "loss"}))["checkpoints"]["auto"]
    losses = {name: summary_of(named)[name]["metrics"]["total"]["loss_increase"]["value"]
              for name in NAMES}  # fmt: skip
    assert nearest["chosen"] == min(losses, key=lambda name: losses[name])
    whole = named.made(named.quantized("w4a16")).manifest.metrics
    share = whole["bytes"] / whole["parent_bytes"] * 1.02
    tight = run(auto(named, search={"minimize": "loss", "max_size": share}))["checkpoints"]["auto"]
    assert tight["chosen"] == "w4a16" and "max_size" in tight["not_here"]["w8a8-int8"]


def test_when_nothing_passes_it_says_what_each_broke(named: Stages) -> None:
    with pytest.raises(GateError, match=r"w4a16: the divergence is(.|\n)*w8a8-int8: the diverg"):
        run(auto(named, max_kl=0.0))
    with pytest.raises(UserError, match=r"no layer of this model begins with model\.layers\.9"):
        run(named.with_schemes("w4a16", keep=("model.layers.9",)))
