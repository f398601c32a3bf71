"""What the plan says is what the training then does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tunesmith.pipeline import Stages
from tunesmith.train import command, plan


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
    after = plan.run(stages_of(**settings))
    assert {part["state"] for part in after["stages"]} == {"made"}
    assert plan.show(after)
    ids = {part["what"]: part["id"] for part in after["stages"]}
    assert ids["data"] == result["data"] and ids["base"] == result["base"]
    assert trained["id"] in ids.values()
