"""What the plan says is what the training then does."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

from tunesmith.config import GateError, UserError
from tunesmith.pipeline import Stages
from tunesmith.train import command, devices, forecast, plan


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_plan_is_what_happens(method: str, stages_of: Callable[..., Stages]) -> None:
    settings = {"method": method, "max_steps": None, "num_train_epochs": 1.5, "save_steps": 3}
    before = plan.run(stages_of(**settings))
    states = {part["what"]: part["state"] for part in before["stages"]}
    assert states["data"] == "to make"
    result = command.run(stages_of(**settings))
    trained, training = result["trained"], before["training"]
    for name in ("steps", "truncated", "dropped", "trainable_parameters", "total_parameters"):
        assert training[name] == trained[name], name
    assert training["supervised_tokens"] == trained["supervised_tokens_seen"]
    assert training["sequences"] == trained["examples"]
    # In one process with other tests the training's peak is theirs too; the benchmark compares.
    assert before["memory"]["parts_gib"]["runtime"] > 0 < trained["peak_memory_gib"]
    after = plan.run(stages_of(**settings))
    assert {part["state"] for part in after["stages"]} == {"made"}
    assert plan.show(after)
    ids = {part["what"]: part["id"] for part in after["stages"]}
    assert ids["data"] == result["data"] and ids["base"] == result["base"]
    assert trained["id"] in ids.values()


def test_a_plan_for_another_device(stages_of: Callable[..., Stages]) -> None:
    stages = stages_of(num_train_epochs=2.0, max_steps=None)
    priced = Stages(stages.recipe.model_validate(
        stages.recipe.model_dump() | {"price": {"gpu_hour_usd": 2.0}}
    ))  # fmt: skip
    found = plan.run(priced, device="h100")
    assert found["memory"]["available_gib"] == pytest.approx(79.6, abs=0.1)
    time = found["time"]
    assert time["usd"] == pytest.approx(2 * time["hours"], abs=1e-6)
    tokens, weights = found["training"]["tokens"], 2 * (64 * (64 * 2 + 32 * 2) + 3 * 64 * 128)
    assert time["useful_tflop"] * 1e12 > 4 * weights * tokens
    assert plan.show(found)
    with pytest.raises(UserError, match=r"no such device: h1000.*h100"):
        plan.run(priced, device="h1000")


def shrink(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    """Leave so much memory beside what the libraries take."""

    def find(name: str = "this") -> devices.Device:
        device = whole(name)
        return dataclasses.replace(device, memory_bytes=device.runtime_bytes + free_bytes)

    whole = devices.find_device
    monkeypatch.setattr(devices, "find_device", find)


@pytest.mark.parametrize(("settings", "free", "advice"), [
    ({}, 0.7, "train.per_device_train_batch_size=4 train.gradient_accumulation_steps=2"),
    ({"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}, 0.8,
     "train.gradient_checkpointing=true"),
])  # fmt: skip
def test_what_cannot_fit_is_refused_with_a_change_that_does(
    settings: dict[str, Any],
    free: float,
    advice: str,
    stages_of: Callable[..., Stages],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = plan.run(stages_of(**settings))["memory"]["parts_gib"]
    needed = (sum(found.values()) - found["runtime"]) * 2**30
    shrink(monkeypatch, int(free * needed))
    with pytest.raises(GateError, match="does not fit") as refused:
        plan.run(stages_of(**settings))
    assert advice in str(refused.value) and "activations" in str(refused.value)
    changes = dict(re.findall(r"train\.(\w+)=(\w+)", str(refused.value)))
    fits = plan.run(stages_of(**settings | changes))["memory"]
    assert fits["peak_gib"] <= fits["available_gib"]


def test_what_fits_nowhere_names_a_larger_device(
    stages_of: Callable[..., Stages], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, 1000)
    monkeypatch.setattr(forecast, "_SHORTEST_TOKENS", 10**6)
    with pytest.raises(GateError, match="it would fit: a10"):
        plan.run(stages_of())
