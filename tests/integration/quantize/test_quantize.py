from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from tunesmith.chat import ChatTemplate
from tunesmith.config import DataError, MissingExtraError, ModelError, TunesmithError
from tunesmith.config.schema.data import Data
from tunesmith.config.schema.quantize import Quantize
from tunesmith.pipeline import Stages
from tunesmith.quantize.calibration import Calibration, calibrate_on, calibration_of
from tunesmith.quantize.checkpoint import verify
from tunesmith.quantize.command import run, show
from tunesmith.quantize.modules import Selection, select
from tunesmith.quantize.schemes import SCHEMES, Method
from tunesmith.train.examples import tokenise_conversations

Rows = list[dict[str, Any]]
Checkpoints = dict[str, dict[str, Any]]


def section(*schemes: str) -> dict[str, Any]:
    return {"quantize": {"scheme": schemes, "calibration_rows": 12}}


@pytest.fixture(scope="module")
def stages(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, stages_of: Callable[..., Stages]
) -> Stages:
    return stages_of(tmp_path_factory.mktemp("quantized"), llama, **section(*SCHEMES))


@pytest.fixture(scope="module")
def made(stages: Stages) -> Checkpoints:
    return run(stages)["checkpoints"]


def opened(folder: str) -> Any:
    """The checkpoint through transformers, its weights dequantized."""
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(dequantize=True)
    )


def weight(model: Any, name: str) -> torch.Tensor:
    return model.get_submodule(name).weight.detach().float()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_on_disk_follow_the_formula(made: Checkpoints, llama: Path, scheme: str) -> None:
    checkpoint = made[scheme]
    tensors = load_file(Path(checkpoint["folder"]) / "model.safetensors")
    method = Method.of(Quantize(scheme=scheme), scheme)
    shapes = select(AutoModelForCausalLM.from_pretrained(llama), method).quantized
    assert checkpoint["quantized"] == sorted(shapes)
    for name in checkpoint["quantized"]:
        stored = sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{name}."))
        assert stored == method.layer_bytes(*shapes[name], checkpoint["group_size"])
    for name in checkpoint["kept"]:
        assert tensors[f"{name}.weight"].dtype == torch.bfloat16
    assert checkpoint["bytes"] < 0.9 * checkpoint["parent_bytes"]
    assert bool(checkpoint["calibration"]) == method.calibrated


@pytest.mark.parametrize(
    ("scheme", "tolerance"), [("w8a8-int8", 0.02), ("w4a16", 0.25), ("fp8-dynamic", 0.04)]
)
def test_transformers_opens_it_and_its_weights_are_near_the_parents(
    made: Checkpoints, llama: Path, scheme: str, tolerance: float
) -> None:
    parent = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    child = opened(made[scheme]["folder"])
    for name in made[scheme]["quantized"]:
        error = (weight(child, name) - weight(parent, name)).norm() / weight(parent, name).norm()
        assert 0 < float(error) < tolerance, name
    for name in made[scheme]["kept"]:
        assert torch.equal(weight(child, name), weight(parent, name)), name


def test_weights_are_fitted_to_the_recipes_own_conversations(
    made: Checkpoints, llama: Path, rows: Rows
) -> None:
    """On the activations of its rows, a layer errs less than rounding to nearest would."""
    name, group = "model.layers.0.mlp.down_proj", made["w4a16"]["group_size"]
    template, parent = ChatTemplate.load(llama), AutoModelForCausalLM.from_pretrained(llama)
    seen: list[torch.Tensor] = []
    parent.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    with torch.no_grad():
        for row in rows:
            parent(torch.tensor([template.supervise(row["messages"]).input_ids[:64]]))
    inputs, exact = torch.cat(seen).float(), weight(parent, name)
    groups = exact.reshape(len(exact), -1, group)
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    rounded = (groups / scale).round().clamp(-8, 7).mul(scale).reshape(exact.shape)
    fitted = weight(opened(made["w4a16"]["folder"]), name)
    assert (inputs @ (fitted - exact).T).norm() < 0.9 * (inputs @ (rounded - exact).T).norm()


def test_the_folder_brings_tokenizer_template_and_generation_defaults(
    made: Checkpoints, llama: Path
) -> None:
    for checkpoint in made.values():
        folder = Path(checkpoint["folder"])
        for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (folder / name).read_bytes() == (llama / name).read_bytes()
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_a_second_run_makes_nothing_and_shows_the_same(
    stages: Stages, made: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    again = run(stages)
    assert all(checkpoint["reused"] for checkpoint in again["checkpoints"].values())
    assert {k: v["id"] for k, v in again["checkpoints"].items()} == {
        k: v["id"] for k, v in made.items()
    }
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(show(again))
    text = console.export_text()
    assert all(v["id"] in text for v in made.values())
    assert "all but CPU" in text


def calibrate(rows: Rows, parent: Path, **data: Any) -> Calibration:
    return calibrate_on(
        rows,
        parent,
        Data.model_validate({"train": "rows.jsonl", **data}),
        chat_template=None,
        trust_remote_code=False,
    )


def test_calibration_reads_what_training_reads_and_counts_what_it_cuts(
    llama: Path, rows: Rows
) -> None:
    template = ChatTemplate.load(llama)
    whole = [len(template.supervise(row["messages"]).input_ids) for row in rows]
    limit = sorted(whole)[len(whole) // 2]
    data = Data.model_validate({"train": "rows.jsonl", "max_length": limit})
    trained = tokenise_conversations(rows, template, data)
    found = calibrate(rows, llama, max_length=limit)
    assert found.input_ids == [example.input_ids.tolist() for example in trained.rows]
    assert found.cut == trained.truncated > 0
    assert found.counts()["tokens"] == sum(map(len, found.input_ids))
    ends = calibrate(rows, llama, max_length=limit, truncation="start")
    assert ends.cut == found.cut and ends.input_ids != found.input_ids


def test_rows_that_the_template_refuses_are_counted_and_never_all_of_them(
    llama: Path, rows: Rows
) -> None:
    refused = {"id": "bad", "messages": [{"role": "user", "content": "and then?"}]}
    assert calibrate([*rows, refused], llama).rejected == 1
    with pytest.raises(DataError, match="row bad: no assistant turn"):
        calibrate([refused], llama)
    with pytest.raises(DataError, match="none has an answer within 4 tokens"):
        calibrate(rows, llama, max_length=4)


def test_of_documents_as_many_pieces_as_rows_are_used_from_all_over_them(llama: Path) -> None:
    rows = [{"id": str(at), "text": f"What is {at} plus {at}? " * 200} for at in range(4)]
    found = calibrate(rows, llama, format="text", max_length=32)
    assert [*map(len, found.input_ids)] == [32] * 4 and found.rows == 4
    assert len({tuple(ids) for ids in found.input_ids}) == 4
    short = calibrate([{"id": "0", "text": "What is 1 plus 1?"}] * 3, llama, format="text")
    assert len(short.input_ids) == 1


def test_another_text_has_the_lengths_of_the_own_rows(
    tmp_path: Path, llama: Path, stages_of: Callable[..., Stages]
) -> None:
    folders = (tmp_path / str(at) for at in count())

    def calibration(**keys: Any) -> Calibration:
        quantize = {"quantize": {"scheme": "w4a16", "calibration_rows": 8, **keys}}
        stages = stages_of(next(folders), llama, **quantize)
        return calibration_of(stages.recipe, stages.made(stages.dataset), llama)

    own, generic = calibration(), calibration(calibration_text="generic")
    assert [*map(len, generic.input_ids)] == [*map(len, own.input_ids)]
    assert generic.input_ids != own.input_ids and generic.text == "generic"
    few = calibration(calibration_tokens=100)
    assert 0 < few.counts()["tokens"] <= 100 < own.counts()["tokens"]
    (tmp_path / "short.txt").write_text("one plus one " * 20)
    short = calibration(calibration_text=str(tmp_path / "short.txt"))
    assert 0 < len(short.input_ids) < 8


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen3", {"head_dim": 32}),
        (
            "gemma3_text",
            {
                "head_dim": 32,
                "query_pre_attn_scalar": 32,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        ("mistral", {"head_dim": 32}),
        ("phi", {}),
        ("phi3", {}),
        ("mixtral", {"head_dim": 32, "num_local_experts": 4}),
    ],
)
def test_other_architectures(
    tmp_path: Path,
    model_of: Callable[..., Path],
    stages_of: Callable[..., Stages],
    architecture: str,
    changes: dict[str, Any],
) -> None:
    base = model_of(tmp_path / "base", architecture, **changes)
    made = run(stages_of(tmp_path, base, **section("w8a8-int8")))["checkpoints"]["w8a8-int8"]
    assert len(made["quantized"]) >= 8
    if architecture == "mixtral":
        # Its experts are stored as engines read them, one matrix each; the routers are kept.
        assert "model.layers.1.mlp.experts.3.down_proj" in made["quantized"]
        assert "model.layers.1.mlp.gate" in made["kept"]
        return
    parent = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    child = opened(made["folder"])
    for name in made["quantized"]:
        error = (weight(child, name) - weight(parent, name)).norm() / weight(parent, name).norm()
        assert 0 < float(error) < 0.02, name


def test_a_template_of_the_recipe_is_the_one_that_is_delivered(
    tmp_path: Path, llama: Path, stages_of: Callable[..., Stages]
) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    made = run(
        stages_of(tmp_path, llama, model={"chat_template": str(template)}, **section("fp8-dynamic"))
    )
    folder = Path(made["checkpoints"]["fp8-dynamic"]["folder"])
    assert ChatTemplate.load(folder).sha256 == ChatTemplate.load(llama, template).sha256
    assert ChatTemplate.load(folder).sha256 != ChatTemplate.load(llama).sha256


def test_a_damaged_scale_is_found(made: Checkpoints, tmp_path: Path) -> None:
    checkpoint = made["w4a16"]
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint["folder"], folder)
    selection = Selection(dict.fromkeys(checkpoint["quantized"], (1, 1)), checkpoint["kept"], 128)
    verify(folder, selection)
    tensors = load_file(folder / "model.safetensors")
    damaged = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[damaged][3, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TunesmithError, match=damaged):
        verify(folder, selection)
    del tensors[damaged]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TunesmithError, match="13 layers have scales, 14 were quantized"):
        verify(folder, selection)


def test_refusals(
    tmp_path: Path,
    llama: Path,
    made: Checkpoints,
    model_of: Callable[..., Path],
    stages_of: Callable[..., Stages],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ModelError, match="quantized already"):
        run(stages_of(tmp_path / "twice", Path(made["w8a8-int8"]["folder"]), **section("w4a16")))
    narrow = model_of(tmp_path / "narrow", "llama", hidden_size=72, intermediate_size=120)
    with pytest.raises(ModelError, match=r"multiples of 32, model.layers.0.*is \d+ x 72"):
        run(stages_of(tmp_path / "odd", narrow, **section("w4a16")))
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    with pytest.raises(MissingExtraError, match="quantize"):
        run(stages_of(tmp_path / "bare", llama, **section("fp8-dynamic")))
