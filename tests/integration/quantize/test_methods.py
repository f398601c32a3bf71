"""Other ways of making a scheme than the default, on a machine without an accelerator."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tunesmith.config import ModelError
from tunesmith.pipeline import Stages
from tunesmith.quantize import quality
from tunesmith.quantize.command import run
from tunesmith.quantize.quality import Quality, judge

SEQUENCES = [(list(range(5, 60)), list(range(1, 55))), (list(range(90, 120)), [7, 29])]


def judged(checkpoint: dict[str, Any], parent: Path) -> list[Quality]:
    return judge(Path(checkpoint["folder"]), parent, SEQUENCES)


def kl(found: list[Quality]) -> float:
    return sum(one.kl_sum_nats for one in found) / sum(one.tokens for one in found)


@pytest.mark.parametrize(
    ("scheme", "keys", "changes_activations"),
    [
        ("w4a16", {"algorithm": "awq"}, True),
        ("w4a16", {"rotation": "spinquant"}, True),
        ("w8a8-int8", {"smoothquant": 0.5}, True),
        ("w8a8-int8", {"kv_cache": "fp8", "algorithm": "rtn"}, False),
        ("w4a16", {"symmetric": False, "group_size": 32, "algorithm": "rtn"}, False),
    ],
    ids=["awq", "spinquant", "smoothquant", "kv-cache", "asymmetric"],
)
def test_it_is_made_as_asked_and_near_its_parent(
    tmp_path: Path,
    llama: Path,
    stages_of: Callable[..., Stages],
    scheme: str,
    keys: dict[str, Any],
    changes_activations: bool,
) -> None:
    section = {"quantize": {"scheme": scheme, "calibration_rows": 4, **keys}}
    made = run(stages_of(tmp_path, llama, **section))["checkpoints"][scheme]
    assert made["changes_activations"] == changes_activations
    assert 0 < kl(judged(made, llama)) < (0.05 if scheme == "w4a16" else 0.001)
    config = json.loads((Path(made["folder"]) / "config.json").read_text())["quantization_config"]
    assert bool(config["kv_cache_scheme"]) == ("kv_cache" in keys)
    tensors = load_file(Path(made["folder"]) / "model.safetensors")
    if not keys.get("symmetric", True):
        name = made["quantized"][0]
        stored = sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}."))
        outputs, inputs = tensors[f"{name}.weight_shape"].tolist()
        assert stored == outputs * inputs // 2 + outputs * (inputs // 32) * 5 // 2 + 16


def test_activations_are_rounded_where_the_scheme_rounds_them(
    tmp_path: Path, llama: Path, stages_of: Callable[..., Stages], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"quantize": {"scheme": ("mxfp4", "mxfp4a16"), "algorithm": "rtn"}}
    made = run(stages_of(tmp_path, llama, **section))["checkpoints"]
    both, weights = judged(made["mxfp4"], llama), judged(made["mxfp4a16"], llama)
    assert kl(both) > 1.3 * kl(weights) > 0
    assert both[0].parent_loss_sum_nats == weights[0].parent_loss_sum_nats
    assert [one.tokens for one in both] == [54, 2]
    monkeypatch.setattr(quality, "_rounds_activations", lambda _: False)
    with pytest.raises(ModelError, match="without rounding its activations"):
        judged(made["mxfp4"], llama)


def test_a_model_against_itself_differs_in_nothing(llama: Path) -> None:
    (first, _) = judge(llama, llama, SEQUENCES)
    assert first == replace(first, kl_sum_nats=0.0, flipped=0)
    assert first.loss_sum_nats == first.parent_loss_sum_nats > 0
