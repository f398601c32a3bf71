"""A checkpoint earns its approval: faults put into quantization are caught in the real engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from taught import teach
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.config import GateError
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import require_approval
from tunesmith.quantize import command, making
from tunesmith.quantize.calibration import Calibration

DAMAGED = "model.layers.1.mlp.up_proj"


def damage(out: Path) -> None:
    """The scales of one layer are four times what they should be."""
    tensors = load_file(out / "model.safetensors")
    tensors[f"{DAMAGED}.weight_scale"] *= 4
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def stages(
    tmp_path_factory: pytest.TempPathFactory,
    model_of: Callable[..., Path],
    rows: list[dict[str, Any]],
    stages_of: Callable[..., Stages],
) -> Stages:
    folder = tmp_path_factory.mktemp("gate")
    base = model_of(folder / "base", "llama")
    teach(base, rows[:48])
    return stages_of(
        folder,
        base,
        quantize={"scheme": ("w4a16", "w8a8-int8"), "calibration_rows": 24, "verify_rows": 12},
        engine={"max_model_len": 256, "max_num_seqs": 8, "kv_cache_gib": 0.25},
    )


@pytest.fixture(scope="module")
def refusal(stages: Stages) -> str:
    """What is said of a W4A16 with a damaged layer and a W8A8 that was calibrated on noise."""
    copy, calibrate = making.copy_companions, making.calibration_of
    source = random.Random(0)
    calibrated: list[Calibration] = []

    def copy_and_damage(parent: Path, out: Path, template: Path | None) -> None:
        copy(parent, out, template)
        if len(calibrated) == 1:
            damage(out)

    def calibrate_on_noise(*arguments: Any) -> Calibration:
        found = calibrate(*arguments)
        if calibrated:
            for ids in found.input_ids:
                ids[:] = [source.randrange(1024) for _ in ids]
        calibrated.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "copy_companions", copy_and_damage)
        patch.setattr(making, "calibration_of", calibrate_on_noise)
        with pytest.raises(GateError) as caught:
            command.run(stages)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_a_damaged_scale_and_calibration_on_noise_are_caught_with_their_layers(
    stages: Stages, refusal: str
) -> None:
    of_damaged, _, of_noise = refusal.partition("w8a8-int8 (checkpoint-")
    assert f"{DAMAGED}: its weights are off by 3" in of_damaged
    assert "quantize.max_kl is 0.1" in of_damaged
    assert "it was calibrated on noise" in of_noise
    assert "layers with the largest weight errors: model.layers." in of_noise


def test_refused_checkpoints_are_kept_and_marked_and_not_served(
    stages: Stages, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in stages.schemes:
        assert stages.store.find(stages.quantized(scheme).id)
        metrics = stages.made(stages.fidelity(scheme)).manifest.metrics
        assert metrics["verdict"]["state"] == "refused"
        with pytest.raises(GateError, match="quantize.allow_refused=true"):
            require_approval(stages, scheme)
    # What was measured is not measured again.
    monkeypatch.setattr("tunesmith.quantize.verification.spawn", None)
    allowing = stages.recipe.quantize.model_copy(update={"allow_refused": True})
    told = Stages(stages.recipe.model_copy(update={"quantize": allowing}), stages.store)
    require_approval(told, "w4a16")
    target, store = stages.store.folder.parent / "delivered", str(stages.store.folder)
    command_line = ["export", stages.quantized("w4a16").id, "--to", str(target), "--store", store]
    done = CliRunner().invoke(app, command_line)
    assert isinstance(done.exception, GateError) and DAMAGED in str(done.exception)
    assert not target.exists()
    assert CliRunner().invoke(app, [*command_line, "--allow-refused"]).exit_code == 0
    assert command.run(told)["fidelity"]["w4a16"]["state"] == "refused"


def test_what_was_measured(stages: Stages, refusal: str) -> None:
    damaged, noisy = (
        stages.made(stages.fidelity(scheme)).manifest.metrics for scheme in stages.schemes
    )
    for metrics, kernel in ((damaged, "WNA16"), (noisy, "Int8")):
        assert metrics["rows"] == 12
        assert any(kernel.lower() in name.lower() for name in metrics["engine"]["kernels"])
        assert metrics["engine"]["load_s"] > 0 and metrics["speed"]["batch_1"]["rounds"] > 0
        assert metrics["engine"]["peak_bytes"] > metrics["engine"]["loaded_bytes"] > 0
        assert metrics["golden"]["asked"] == 4
    assert noisy["total"]["kl"]["high"] < 0.1 * damaged["total"]["kl"]["low"]
