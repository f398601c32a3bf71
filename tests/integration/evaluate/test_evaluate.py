"""The whole of `tunesmith eval` in the real engine, checked against transformers."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from tunesmith.chat import ChatTemplate
from tunesmith.config.schemes import has_amx
from tunesmith.evaluate.command import run, show
from tunesmith.evaluate.variants import read_rows
from tunesmith.pipeline import Stages
from tunesmith.quantize.command import run as quantize

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@pytest.fixture(scope="module")
def stages(
    tmp_path_factory: pytest.TempPathFactory,
    llama: Path,
    rows: list[dict[str, Any]],
    stages_of: Callable[..., Stages],
) -> Stages:
    """A base, an adapter that learnt a little, the merged model, and its quantized copies."""
    stages = stages_of(
        tmp_path_factory.mktemp("evaluated"),
        llama,
        model={"dtype": "float32"},
        train={"method": "lora", "lora": {"r": 4}},
        quantize={"scheme": ("w8a8-int8", "fp8-dynamic"), "calibration_rows": 24},
        evaluate={
            "variants": ("base", "adapter", "tuned", "w8a8-int8", "fp8-dynamic"),
            "tasks": ("completion_loss", "chrf", "rouge_l"),
            "max_tokens": 8,
        },
        engine={"max_model_len": 256, "max_num_seqs": 8, "kv_cache_gib": 0.25},
    )
    base = stages.made(stages.base).root
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules="all-linear", lora_alpha=8)
    adapted = get_peft_model(model, config)
    learn(adapted, ChatTemplate.load(base), rows[:48])
    with stages.store.write(stages.trained, stages.recipe) as work:
        adapted.save_pretrained(work.out)
        copy(base, work.out)
    with stages.store.write(stages.tuned, stages.recipe) as work:
        adapted.merge_and_unload().save_pretrained(work.out)
        copy(base, work.out)
    quantize(stages)
    return stages


def learn(model: Any, template: ChatTemplate, rows: list[dict[str, Any]]) -> None:
    """One pass over the rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for row in rows:
        example = template.supervise(row["messages"])
        ids = torch.tensor([example.input_ids])
        labels = ids.masked_fill(~torch.tensor([example.mask]), -100)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def copy(base: Path, out: Path) -> None:
    for name in COMPANIONS:
        shutil.copyfile(base / name, out / name)


@pytest.fixture(scope="module")
def result(stages: Stages) -> dict[str, Any]:
    return run(stages)


def rows_of(stages: Stages, variant: str) -> dict[str, Any]:
    return {row["id"]: row for row in read_rows(stages.made(stages.evaluation(variant)))}


@pytest.mark.parametrize("variant", ["base", "adapter", "tuned"])
def test_loss_and_answer_are_those_of_transformers(
    stages: Stages, result: dict[str, Any], rows: list[dict[str, Any]], variant: str
) -> None:
    base = stages.made(stages.base).root
    folder = stages.made(stages.tuned).root if variant == "tuned" else base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if variant == "adapter":
        model = PeftModel.from_pretrained(model, stages.made(stages.trained).root)
    template = ChatTemplate.load(base)
    measured = rows_of(stages, variant)
    assert measured.keys() == {row["id"] for row in rows[48:]}
    for row in rows[48:]:
        example = template.supervise(row["messages"])
        ids = torch.tensor([example.input_ids[:64]])
        learnt = torch.tensor(example.mask[:64])[1:]
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        expected = -logprobs.gather(-1, ids[0, 1:, None])[:, 0][learnt].sum()
        found = measured[row["id"]]
        assert found["completion_tokens"] == int(learnt.sum())
        assert found["completion_loss_sum_nats"] == pytest.approx(float(expected), rel=1e-4)
        prompt = torch.tensor([template.prompt_ids(row["messages"][:1])])
        with torch.no_grad():
            written = model.generate(
                input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=3
            )
        text = template.tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
        # The engine leaves out the beginning of a character that is cut in two.
        assert found["answer"].rstrip("\ufffd") == text.rstrip("\ufffd")
        assert found["reference"] == row["messages"][1]["content"]


def test_comparisons(stages: Stages, result: dict[str, Any]) -> None:
    pairs = {
        (found["variant"], found["against"]): found
        for found in result["comparisons"]
        if found["metric"] == "completion_loss"
    }
    expected = {("tuned", "base"), ("adapter", "tuned"), ("w8a8-int8", "tuned")}
    if has_amx():  # vLLM's kernel for such CPUs takes no 32-bit activations
        expected -= {("w8a8-int8", "tuned")}
        assert "AMX" in result["refused"]["w8a8-int8"]
    assert pairs.keys() == expected
    assert pairs["tuned", "base"]["relative_percent"]["high"] < -5.0
    assert pairs["tuned", "base"]["excludes_zero"]
    levels = {name: found["completion_loss"] for name, found in result["variants"].items()}
    assert pairs["tuned", "base"]["difference"]["value"] == pytest.approx(
        levels["tuned"] - levels["base"]
    )
    assert abs(pairs["adapter", "tuned"]["relative_percent"]["value"]) < 0.01
    if has_amx():
        return
    quantized = pairs["w8a8-int8", "tuned"]["relative_percent"]
    assert 0.0 < abs(quantized["value"]) < 2.0
    assert quantized["low"] <= quantized["value"] <= quantized["high"]


def test_what_the_engine_of_a_cpu_cannot_run_is_a_line_and_no_crash(
    stages: Stages, result: dict[str, Any]
) -> None:
    if "fp8-dynamic" in result["variants"]:
        pytest.skip("this machine has a GPU that runs it")
    assert "CPU" in result["refused"]["fp8-dynamic"]
    console = Console(width=300, file=io.StringIO(), record=True)
    console.print(show(result))
    text = console.export_text()
    assert result["refused"]["fp8-dynamic"] in text
    assert json.dumps(result)


def test_a_second_run_starts_no_engine(
    stages: Stages, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.evaluate.variants.open_llm", None)
    again = run(stages)
    assert again["reused"] == list(result["variants"])
    assert again["comparisons"] == result["comparisons"]
