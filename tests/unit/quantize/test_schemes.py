from __future__ import annotations

import typing
from pathlib import Path

import pytest

from tunesmith.config import RecipeError, load_recipe
from tunesmith.config.schema.base import SchemeName
from tunesmith.config.schema.quantize import Device
from tunesmith.quantize.schemes import DEVICES, SCHEMES


def test_every_scheme_of_the_recipe_is_in_the_table_and_runs_somewhere() -> None:
    assert set(SCHEMES) == set(typing.get_args(SchemeName))
    assert set(DEVICES) == set(typing.get_args(Device)) - {"any"}
    for scheme in SCHEMES.values():
        assert scheme.refused_by.keys() < DEVICES.keys()
        assert scheme.computed_as.keys() <= DEVICES.keys() - scheme.refused_by.keys()
        assert all(reason for reason in scheme.refused_by.values())


@pytest.mark.parametrize(
    ("name", "group_size", "expected"),
    [
        ("w8a8-int8", None, 4096 * 1024 + 4096 * 2),
        ("fp8-dynamic", None, 4096 * 1024 + 4096 * 2),
        ("fp8-static", None, 4096 * 1024 + 2 + 2),
        ("fp8-block", 128, 4096 * 1024 + 32 * 8 * 2),
        ("w4a16", 128, 4096 * 1024 // 2 + 4096 * 8 * 2 + 16),
        ("w4a16", 32, 4096 * 1024 // 2 + 4096 * 32 * 2 + 16),
        ("w3a16", 128, 4096 * 1024 * 3 // 8 + 4096 * 8 * 2 + 16),
        ("nvfp4", 16, 4096 * 1024 // 2 + 4096 * 64 + 8),
        ("mxfp4a16", 32, 4096 * 1024 // 2 + 4096 * 32),
    ],
)
def test_size_of_a_stored_layer(name: str, group_size: int | None, expected: int) -> None:
    assert SCHEMES[name].layer_bytes(4096, 1024, group_size) == expected


def test_a_zero_point_of_each_group_takes_as_many_bits_as_a_weight() -> None:
    scheme = SCHEMES["w4a16"]
    more = scheme.layer_bytes(64, 256, 128, symmetric=False) - scheme.layer_bytes(64, 256, 128)
    assert more == 64 * 2 // 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "scheme: fp8-dynamic, device: cpu_amx",
            "quantize.device: fp8-dynamic: vLLM has no usable FP8 kernel with per-channel scales "
            "for CPUs; it runs on Ampere (A100), Ada (L4, L40S), Hopper (H100, H200), Blackwell "
            "(B200); nearest here: fp8-block",
        ),
        ("scheme: [w4a16, nvfp4], device: cpu", "nearest here: w4a16"),
        ("scheme: w8a8-int8, device: sm_100", "nearest here: fp8-dynamic"),
        ("scheme: nvfp4, algorithm: awq", "quantize.algorithm: nvfp4 is made by gptq or rtn"),
        ("scheme: w8a8-int8, group_size: 64", "quantize.group_size: is not for w8a8-int8, but for"),
        ("scheme: w4a16, smoothquant: 0.5", "smoothquant: is not for w4a16, but for w8a8-int8"),
        ("scheme: fp8-block, rotation: spinquant", "rotation: is not for fp8-block, but for"),
        ("scheme: nvfp4a16, symmetric: false", "nvfp4a16 has no zero points; w4a16 may"),
    ],
)
def test_what_cannot_be_is_refused_at_its_line(tmp_path: Path, keys: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = keys.replace(", ", "\n  ").replace("[w4a16\n  nvfp4]", "[w4a16, nvfp4]")
    recipe.write_text(
        f"name: x\nmodel: {{base: b}}\ndata: {{train: t.jsonl}}\nquantize:\n  {text}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert str(caught.value).startswith(f"{recipe}:6: quantize.")
    assert message in str(caught.value)


def test_a_device_that_runs_the_scheme_is_accepted(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nmodel: {base: b}\ndata: {train: t.jsonl}\n"
        "quantize: {scheme: [w8a8-int8, fp8-block], device: cpu_amx}\n"
    )
    assert load_recipe(recipe).quantize is not None
    assert load_recipe(recipe, ["quantize.scheme=nvfp4", "quantize.device=any"]).quantize
