"""Approval is earned: every gated figure's upper bound within its limit, and no layer far off."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.config import GateError, Recipe
from tunesmith.config.schema.quantize import Quantize
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import Verdict, allow, judge

LIMITS = Quantize(scheme="w4a16")


def figure(value: float, reach: float = 0.0) -> dict[str, float]:
    return {"value": value, "low": value - reach, "high": value + reach}


def fidelity(**changes: Any) -> dict[str, Any]:
    total = {"loss_increase": figure(0.01), "kl": figure(0.002), "flipped": figure(0.03)}
    return {
        "loads": True,
        "golden": {"asked": 4, "answered": 4, "by_parent": 4},
        "total": total | changes.pop("total", {}),
        "calibration": None,
        **changes,
    }


def checkpoint(**changes: float) -> dict[str, Any]:
    """Fourteen layers, all alike but for those named."""
    layers = {
        f"model.layers.{block}.mlp.{kind}_proj": {"error": 0.1 + at / 100, "worst_row": 0.2}
        for block in range(7)
        for at, kind in enumerate(("up", "down"))
    }
    for name, error in changes.items():
        layers[f"model.layers.1.mlp.{name}_proj"] = {"error": error, "worst_row": error}
    return {"layers": layers}


def test_figures_within_their_limits_are_approved_and_none_is_unverified() -> None:
    assert judge(checkpoint(), fidelity(), LIMITS) == Verdict("approved")
    assert judge(checkpoint(), None, LIMITS) == Verdict("unverified")
    assert judge({}, fidelity(), LIMITS) == Verdict("approved")


@pytest.mark.parametrize(
    ("found", "limits", "words"),
    [
        ({"loss_increase": figure(0.09, 0.01)}, {}, "the loss rises by 9 % [8, 10], and"),
        ({"loss_increase": figure(0.045, 0.01)}, {}, "more quantize.verify_rows may show"),
        ({"kl": figure(0.2)}, {}, "quantize.max_kl is 0.1 nats per token"),
        ({}, {"max_flipped": 0.02}, "the likeliest token differs at 3 %"),
    ],
)
def test_the_upper_bound_decides(
    found: dict[str, Any], limits: dict[str, float], words: str
) -> None:
    verdict = judge(checkpoint(), fidelity(total=found), LIMITS.model_copy(update=limits))
    assert verdict.state == "refused"
    assert words in verdict.reasons[0]
    assert "mlp.down_proj (11.0%)" in verdict.reasons[-1]


def test_without_limits_figures_are_only_reported() -> None:
    free = LIMITS.model_copy(update={"max_loss_increase": None, "max_kl": None})
    bad = fidelity(total={"loss_increase": figure(2.0), "kl": figure(3.0)})
    assert judge(checkpoint(), bad, free).state == "approved"


def test_a_layer_that_is_far_off_is_named_even_where_nothing_was_measured() -> None:
    verdict = judge(checkpoint(up=3.0), None, LIMITS)
    assert verdict.state == "refused"
    assert verdict.reasons[0].startswith("model.layers.1.mlp.up_proj: its weights are off by 300%")
    one_row = checkpoint()
    one_row["layers"]["model.layers.4.mlp.down_proj"] = {"error": 0.3, "worst_row": 3.0}
    [reason, _] = judge(one_row, fidelity(), LIMITS).reasons
    assert reason.startswith("model.layers.4.mlp.down_proj: the weights of one output are off")


def test_layers_that_are_all_equally_far_off_are_no_outliers() -> None:
    """A rotation changes every weight, and no output."""
    rotated = {f"layer.{at}": {"error": 1.4, "worst_row": 1.6} for at in range(14)}
    assert judge({"layers": rotated}, fidelity(), LIMITS).state == "approved"


def test_a_kind_of_layer_that_is_off_in_every_block_is_no_outlier() -> None:
    moved = {
        f"layers.{block}.{kind}_proj": {"error": error, "worst_row": 2 * error}
        for block in range(4)
        for kind, error in (("q", 0.1), ("k", 0.1), ("o", 0.1), ("v", 0.9))
    }
    assert judge({"layers": moved}, fidelity(), LIMITS).state == "approved"


@pytest.mark.parametrize(
    ("loss", "held_out", "refused"),
    [(11.0, 4.9, True), (6.0, 4.9, False), (8.5, 8.4, False)],
    ids=["noise", "another subject", "a model that knows nothing"],
)
def test_calibration_on_noise(loss: float, held_out: float, refused: bool) -> None:
    calibration = {
        "loss": figure(loss, 0.1),
        "held_out_loss": figure(held_out, 0.1),
        "vocabulary": 4096,
    }
    verdict = judge(checkpoint(), fidelity(calibration=calibration), LIMITS)
    assert (verdict.state == "refused") is refused
    assert refused is any("calibrated on noise" in reason for reason in verdict.reasons)


def test_what_does_not_load_or_does_not_answer() -> None:
    refusal = {"loads": False, "refusal": "vLLM does not take it: no kernel"}
    assert judge(checkpoint(), refusal, LIMITS).reasons[0] == refusal["refusal"]
    mute = fidelity(golden={"asked": 4, "answered": 0, "by_parent": 4})
    assert "none of 4 golden prompts" in judge(checkpoint(), mute, LIMITS).reasons[0]
    both = fidelity(golden={"asked": 4, "answered": 0, "by_parent": 0})
    assert judge(checkpoint(), both, LIMITS).state == "approved"


def test_a_refused_checkpoint_is_used_only_when_told(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def stages(**quantize: Any) -> Stages:
        recipe = Recipe.model_validate(
            {
                "name": "test",
                "store": {"folder": tmp_path / "store"},
                "model": {"base": str(tmp_path)},
                "data": {"train": str(tmp_path / "rows.jsonl")},
                "quantize": {"scheme": "w4a16", **quantize},
            }
        )
        return Stages(recipe)

    refused = {"w4a16": Verdict("refused", ("the loss rises",))}
    with pytest.raises(GateError, match="is refused:\n  the loss rises\nthe checkpoint is kept"):
        allow(stages(), refused)
    allow(stages(allow_refused=True), refused)
    assert "taken all the same" in capsys.readouterr().err
    allow(stages(), {"w4a16": Verdict("unverified")})
    # Neither limits nor the permission change what is made or measured.
    free = stages(max_kl=None, max_loss_increase=0.5, allow_refused=True)
    assert free.fidelity("w4a16").id == stages().fidelity("w4a16").id
    assert stages(verify_rows=32).fidelity("w4a16").id != stages().fidelity("w4a16").id
