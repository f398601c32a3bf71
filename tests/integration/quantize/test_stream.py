"""Layer by layer: the same weights as llm-compressor's own pipelines, and no layer twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tunesmith.config.schema.quantize import Quantize
from tunesmith.pipeline import Stages
from tunesmith.quantize import compress as compressing
from tunesmith.quantize.calibration import Calibration
from tunesmith.quantize.command import run
from tunesmith.quantize.compress import Compressed, compress
from tunesmith.quantize.schemes import Method
from tunesmith.quantize.stream import Stream

GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.fixture(scope="module")
def texts() -> Calibration:
    generator = torch.Generator().manual_seed(0)
    lengths = (40, 64, 33, 64)
    ids = [torch.randint(4, 1024, (length,), generator=generator).tolist() for length in lengths]
    return Calibration(ids, rows=4, cut=0, rejected=0)


def quantize(
    parent: Path, out: Path, texts: Calibration, scheme: str = "w8a8-int8", **settings: Any
) -> Compressed:
    scratch = out.with_name(f"{out.name}-scratch")
    for folder in (out, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    method = Method.of(Quantize(scheme=scheme, **settings), scheme)  # type: ignore[arg-type]
    return compress(
        parent,
        out,
        method,
        texts if method.calibrated else None,
        dtype="bfloat16",
        trust_remote_code=False,
        scratch=scratch,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name
    assert (one / "config.json").read_text() == (other / "config.json").read_text()


@pytest.mark.parametrize(
    ("architecture", "changes", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}, {"scheme": "w4a16"}),
        ("llama", {}, {"scheme": "w8a8-int8", "smoothquant": 0.5}),
        ("llama", {}, {"scheme": "w4a16", "algorithm": "awq"}),
        ("llama", {}, {"scheme": "fp8-static", "kv_cache": "fp8"}),
        ("llama", {}, {"scheme": "nvfp4"}),
        ("qwen3", {"head_dim": 32}, {"scheme": "fp8-dynamic"}),
        ("phi", {}, {"scheme": "w4a16", "symmetric": False}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_the_weights_are_those_of_llm_compressors_own_pipeline(
    tmp_path: Path,
    model_of: Callable[..., Path],
    texts: Calibration,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    changes: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    parent = model_of(tmp_path / "parent", architecture, **changes)
    done = quantize(parent, tmp_path / "layers", texts, **settings)
    monkeypatch.setattr(compressing, "why_whole", lambda *_: "asked for")
    other = quantize(parent, tmp_path / "whole", texts, **settings)
    assert (done.whole, other.whole) == (None, "asked for")
    assert done.selection == other.selection
    assert_same(tmp_path / "layers", tmp_path / "whole")


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma3_text", GEMMA),
        ("mistral", {"sliding_window": 32, "head_dim": 32}),
        ("phi3", {"sliding_window": 32}),
    ],
)
def test_models_with_a_sliding_window_are_held_whole(
    tmp_path: Path,
    model_of: Callable[..., Path],
    texts: Calibration,
    architecture: str,
    changes: dict[str, Any],
) -> None:
    parent = model_of(tmp_path / "parent", architecture, **changes)
    done = quantize(parent, tmp_path / "made", texts, "w8a8-int8")
    assert done.whole and "sliding window" in done.whole


def test_what_is_kept_is_the_parents_even_where_norms_have_an_offset(
    tmp_path: Path, model_of: Callable[..., Path], texts: Calibration
) -> None:
    full = {"layer_types": ["full_attention", "full_attention"]}
    parent = model_of(tmp_path / "parent", "gemma3_text", **GEMMA | full)
    tensors = weights(parent)
    for name in tensors:
        if "norm" in name:
            tensors[name] = torch.linspace(-0.01, 0.01, len(tensors[name])).bfloat16()
    save_file(tensors, parent / "model.safetensors", {"format": "pt"})
    done = quantize(parent, tmp_path / "made", texts, "w4a16")
    made = weights(tmp_path / "made")
    assert done.whole is None
    for name in done.selection.kept.keys() - {"lm_head"}:
        assert torch.equal(made[f"{name}.weight"], tensors[f"{name}.weight"]), name


def test_a_kill_costs_no_finished_layer_and_changes_no_bit(
    tmp_path: Path, model_of: Callable[..., Path], stages_of: Callable[..., Stages]
) -> None:
    parent = model_of(tmp_path / "parent", "llama", num_hidden_layers=6)
    section = {"quantize": {"scheme": "w4a16", "calibration_rows": 24}}
    whole = run(stages_of(tmp_path / "one", parent, **section))["checkpoints"]["w4a16"]
    stages = stages_of(tmp_path / "two", parent, **section)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(json.loads(stages.recipe.model_dump_json(exclude_none=True))))
    layers = stages.store.scratch(stages.quantized("w4a16")) / "layers"
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.cli", "quantize", str(recipe)], stderr=stderr
        )
        while process.poll() is None and not (layers / "layer-00001.safetensors").exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "stderr").read_text()
    finished = {path: path.stat() for path in layers.glob("layer-*.safetensors")}
    assert 2 <= len(finished) < 6
    rewritten: list[int] = []
    quantize_layer = Stream._quantize

    def counted(self: Stream, at: int, bar: Any) -> None:
        rewritten.append(at)
        quantize_layer(self, at, bar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "_quantize", counted)
        resumed = run(stages)["checkpoints"]["w4a16"]
    assert rewritten == list(range(len(finished), 6))
    assert resumed["id"] == whole["id"]
    assert_same(Path(resumed["folder"]), Path(whole["folder"]))


def test_sharded_parents_and_large_results(
    tmp_path: Path, llama: Path, texts: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    model.save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    quantize(llama, tmp_path / "one", texts)
    monkeypatch.setattr("tunesmith.quantize.weights._ONE_FILE_BYTES", 1)
    monkeypatch.setattr("tunesmith.quantize.stream._REST_BYTES", 1)
    quantize(sharded, tmp_path / "many", texts)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    expected = weights(tmp_path / "one")
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, framework="pt") as part:
            assert torch.equal(part.get_tensor(name), expected[name])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_what_cannot_go_layer_by_layer_is_done_whole_and_says_why(
    tmp_path: Path, llama: Path, texts: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    model.config.save_pretrained(old)
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    done = quantize(old, tmp_path / "made", texts, "fp8-dynamic")
    assert done.whole and done.whole.startswith("no safetensors file has model.embed_tokens")
    assert f"the whole model is held in memory: {done.whole}" in capsys.readouterr().err
    quantize(llama, tmp_path / "layers", texts, "fp8-dynamic")
    assert_same(tmp_path / "layers", tmp_path / "made")


def test_work_of_another_environment_is_not_continued(
    tmp_path: Path, llama: Path, texts: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(llama, tmp_path / "made", texts)
    stamp = tmp_path / "made-scratch" / "layers" / "stamp.json"
    before = os.stat(stamp.with_name("layer-00000.safetensors")).st_mtime_ns
    stamp.write_text(stamp.read_text().replace('"torch": "', '"torch": "0.'))
    quantize(llama, tmp_path / "again", texts)
    (tmp_path / "made" / "model.safetensors").unlink()
    quantize(llama, tmp_path / "made", texts)
    assert "the environment has changed; it begins again" in capsys.readouterr().err
    assert os.stat(stamp.with_name("layer-00000.safetensors")).st_mtime_ns != before
    assert_same(tmp_path / "made", tmp_path / "again")
