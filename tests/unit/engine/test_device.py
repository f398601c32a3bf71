from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config import ModelError
from tunesmith.config.schemes import SCHEMES
from tunesmith.engine.device import check_device

WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def model(folder: Path, weights: dict[str, Any] | None) -> Path:
    groups = {"weights": {"weights": weights, "input_activations": None}}
    quantization = {"quantization_config": {"config_groups": groups}} if weights else {}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **quantization}))
    return folder


def test_a_checkpoint_that_would_fail_on_a_cpu_is_refused_before_it_is_loaded(
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError, match=r"nvfp4a16: .*runs on Ampere .*nearest here: w4a16"):
        check_device(model(tmp_path, WEIGHTS), gpu=False)


def test_others_are_left_to_vllm(tmp_path: Path) -> None:
    check_device(tmp_path, gpu=False)
    check_device(model(tmp_path, None), gpu=False)
    check_device(model(tmp_path, WEIGHTS | {"type": "int", "num_bits": 5}), gpu=False)
    runs = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128}
    assert "cpu" not in SCHEMES["w4a16"].refused_by
    check_device(model(tmp_path, runs), gpu=False)
