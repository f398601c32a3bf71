from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config import ModelError
from tunesmith.config.schemes import SCHEMES
from tunesmith.engine import fit
from tunesmith.engine.fit import check_adapter, check_device, check_takes_adapters

WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


INT8 = {
    "config_groups": {
        "weights": {
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
            "input_activations": {
                "num_bits": 8, "type": "int", "strategy": "token", "dynamic": True
            },
        }
    },
    "format": "int-quantized",
}  # fmt: skip


def model(folder: Path, weights: dict[str, Any] | None) -> Path:
    groups = {"weights": {"weights": weights, "input_activations": None}}
    quantization = {"quantization_config": {"config_groups": groups}} if weights else {}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **quantization}))
    return folder


def test_a_checkpoint_that_would_fail_on_a_cpu_is_refused_before_it_is_loaded(
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError, match=r"nvfp4a16: .*runs on Ampere .*nearest here: w4a16"):
        check_device(model(tmp_path, WEIGHTS), "bfloat16", gpu=False)


def test_others_are_left_to_vllm(tmp_path: Path) -> None:
    check_device(tmp_path, "bfloat16", gpu=False)
    check_device(model(tmp_path, None), "bfloat16", gpu=False)
    check_device(model(tmp_path, WEIGHTS | {"type": "int", "num_bits": 5}), "bfloat16", gpu=False)
    runs = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128}
    assert "cpu" not in SCHEMES["w4a16"].refused_by
    check_device(model(tmp_path, runs), "bfloat16", gpu=False)


@pytest.mark.parametrize(
    ("dtype", "architecture", "words"),
    [
        ("float32", "LlamaForCausalLM", "set model.dtype: bfloat16"),
        ("bfloat16", "PhiForCausalLM", "runs PhiForCausalLM, gives it others: use w4a16"),
        ("bfloat16", "LlamaForCausalLM", None),
    ],
)
def test_what_the_int8_kernel_of_amx_would_stop_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    architecture: str,
    words: str | None,
) -> None:
    config = {"architectures": [architecture], "quantization_config": INT8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(fit, "has_amx", lambda: True)
    found = fit.refused_here(tmp_path, dtype, gpu=False)
    assert (words in found) if words and found else found is words
    monkeypatch.setattr(fit, "has_amx", lambda: False)
    assert fit.refused_here(tmp_path, dtype, gpu=False) is None


@pytest.mark.parametrize(
    ("gpu", "amx", "bits", "is_refused"),
    [
        (False, False, 8, True),
        (False, True, 8, False),
        (True, False, 8, False),
        (False, False, 0, False),
    ],
)
def test_int8_takes_no_adapter_on_a_cpu_without_amx(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    amx: bool,
    bits: int,
    is_refused: bool,
) -> None:
    config = {"quantization_config": INT8} if bits else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(fit, "has_amx", lambda: amx)
    with pytest.raises(ModelError, match="over w4a16") if is_refused else nullcontext():
        check_takes_adapters(tmp_path, gpu=gpu)


def test_an_adapter_of_the_parent_does_not_fit_where_activations_were_changed(
    tmp_path: Path,
) -> None:
    def folder(name: str, **manifest: Any) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
        return tmp_path / name

    smoothed = {
        "id": "checkpoint-2",
        "label": "w8a8-int8",
        "metrics": {"changes_activations": True},
    }
    changed = folder("changed", **smoothed)
    plain = folder("plain", **smoothed | {"metrics": {}})
    of_parent = folder("of-parent", parents={"base": "base-1"})
    of_changed = folder("of-changed", parents={"base": "checkpoint-2"})
    check_adapter(plain, of_parent)
    check_adapter(changed, of_changed)
    check_adapter(tmp_path, of_parent)
    with pytest.raises(ModelError, match="was not trained over checkpoint-2, whose w8a8-int8 has"):
        check_adapter(changed, of_parent)
