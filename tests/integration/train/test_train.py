"""From a recipe to finished artifacts, for every method and several architectures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.chat import ChatTemplate
from tunesmith.config import DataError, ModelError
from tunesmith.config.schema.train import Lora
from tunesmith.pipeline import Stages
from tunesmith.train import command
from tunesmith.train import model as models
from tunesmith.train.language import EVALUATION_FILE, read_language
from tunesmith.train.loss import TokenLoss, collate
from tunesmith.train.mend import mend_quantization

StagesOf = Callable[..., Stages]
QUESTION = [{"role": "user", "content": "What is 3 plus 3?"}]
ANSWER = {"role": "assistant", "content": "3 plus 3 is 6. "}


def logits(model: Any, folder: Path) -> torch.Tensor:
    ids = ChatTemplate.load(folder).supervise([*QUESTION, ANSWER]).input_ids
    with torch.no_grad():
        return model.float().eval()(input_ids=torch.tensor([ids])).logits


@torch.no_grad()
def held_out_loss(stages: Stages, trained: dict[str, Any]) -> float:
    """Of the adapter as PEFT loads it on the untouched base."""
    base = AutoModelForCausalLM.from_pretrained(stages.made(stages.base).root)
    model = TokenLoss(PeftModel.from_pretrained(base, trained["path"]), torch.float32).eval()
    recipe, nats, tokens = stages.recipe, 0.0, 0
    assert recipe.data
    language = read_language(Path(trained["path"]), recipe)
    for row in language.tokenise(stages.made(stages.dataset), EVALUATION_FILE, recipe.data).rows:
        batch = collate([row])
        nats += float(model(batch.input_ids_BS, batch.positions_N, batch.targets_N).sum())
        tokens += len(batch.targets_N)
    return nats / tokens


def test_lora_end_to_end(stages_of: StagesOf, base_of: Callable[[str], Path]) -> None:
    stages = stages_of(max_steps=30)
    result = command.run(stages)
    trained, tuned = result["trained"], result["tuned"]
    assert trained["eval_loss_after"] < 0.8 * trained["eval_loss_before"]
    assert command.show(result)

    adapter, merged = Path(trained["path"]), Path(tuned["path"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == result["base"]
    base = AutoModelForCausalLM.from_pretrained(base_of("llama"))
    before = logits(base, base_of("llama"))
    beside = logits(PeftModel.from_pretrained(base, adapter), adapter)
    folded = logits(AutoModelForCausalLM.from_pretrained(merged), merged)
    torch.testing.assert_close(folded, beside, rtol=1e-4, atol=1e-4)
    assert (before - beside).abs().max() > 0.5
    assert tuned["kl_nats"]["original"] <= 1e-4

    template = ChatTemplate.load(merged)
    assert template.sha256 == trained["template_sha256"] == tuned["template_sha256"]
    generation = json.loads((merged / "generation_config.json").read_text())
    ends = generation["eos_token_id"]
    assert template.end_of_turn_id in (ends if isinstance(ends, list) else [ends])

    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 8, 16, 24, 30]
    assert not stages.store.faults(stages.store.get(trained["id"]))


@pytest.mark.parametrize("lora", [
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa", "use_rslora": True},
])  # fmt: skip
def test_other_adapters_are_saved_as_they_were_trained(
    lora: dict[str, Any], stages_of: StagesOf
) -> None:
    """What PEFT loads on the untouched base has the held-out loss that the training ended with."""
    stages = stages_of(max_steps=20, lora={"r": 4, "lora_alpha": 8} | lora)
    result = command.run(stages)
    trained, tuned = result["trained"], result["tuned"]
    assert trained["eval_loss_after"] < 0.8 * trained["eval_loss_before"]
    assert tuned["kl_nats"]["original"] <= 1e-4
    assert held_out_loss(stages, trained) == pytest.approx(trained["eval_loss_after"], rel=1e-4)


def test_the_second_run_reuses_everything(stages_of: StagesOf) -> None:
    first = command.run(stages_of())
    again = stages_of()
    times = {path: path.stat().st_mtime_ns for path in again.store.folder.rglob("artifacts/**/*")}
    assert command.run(again) == first
    after = {path: path.stat().st_mtime_ns for path in again.store.folder.rglob("artifacts/**/*")}
    assert after == times


def test_qlora_keeps_the_better_merge(stages_of: StagesOf) -> None:
    result = command.run(stages_of(method="qlora", max_steps=20, model={"dtype": "bfloat16"}))
    trained, tuned = result["trained"], result["tuned"]
    assert trained["eval_loss_after"] < 0.9 * trained["eval_loss_before"]
    assert trained["total_parameters"] > 130_000  # packed weights are counted one by one
    kl = tuned["kl_nats"]
    assert tuned["merged_into"] == min(kl, key=kl.__getitem__)
    assert kl["dequantized"] < kl["original"]
    merged = Path(tuned["path"])
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    _, loading = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def test_loftq_starts_nearer_to_the_base(
    stages_of: StagesOf, base_of: Callable[[str], Path]
) -> None:
    base, device = base_of("llama"), torch.device("cpu")
    exact = logits(AutoModelForCausalLM.from_pretrained(base), base)

    def distance(mended: bool) -> float:
        model = models.load_base(base, torch.float32, device, nf4=True)
        adapted = models.add_adapter(model, Lora(r=16, lora_alpha=48))
        if mended:
            mend_quantization(adapted, base)
        return float((logits(adapted, base) - exact).norm())

    assert distance(mended=True) < 0.7 * distance(mended=False)
    result = command.run(
        stages_of(method="qlora", max_steps=20, lora={"init_lora_weights": "loftq", "r": 16})
    )
    trained, tuned = result["trained"], result["tuned"]
    assert trained["eval_loss_after"] < 0.9 * trained["eval_loss_before"]
    assert tuned["merged_into"] == "dequantized" and tuned["kl_nats"]["dequantized"] < 1e-4


def test_full_changes_every_matrix(stages_of: StagesOf, base_of: Callable[[str], Path]) -> None:
    stages = stages_of(method="full", learning_rate=2e-3, model={"dtype": "bfloat16"})
    result = command.run(stages)
    trained = result["trained"]
    assert "tuned" not in result and trained["id"].startswith("checkpoint-")
    assert trained["eval_loss_after"] < trained["eval_loss_before"]
    assert trained["trainable_parameters"] == trained["total_parameters"]
    before = load_file(base_of("llama") / "model.safetensors")
    after = load_file(Path(trained["path"]) / "model.safetensors")
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    same = [name for name, weight in after.items() if torch.equal(weight, before[name].bfloat16())]
    assert not same


def test_pretrain_makes_a_base_that_can_be_tuned(stages_of: StagesOf, tmp_path: Path) -> None:
    texts = [f"def add_{at}(a, b):\n    return a + b + {at}\n" for at in range(200)]
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    stages = stages_of(
        base=None,
        method="pretrain",
        architecture={**shape, "vocab_size": 512},
        model={"dtype": "bfloat16"},
        data={"train": str(tmp_path / "text.jsonl"), "format": "text", "max_length": 32},
        max_steps=40,
    )
    trained = command.run(stages)["trained"]
    assert trained["id"].startswith("base-")
    assert trained["eval_loss_after"] < 0.5 * trained["eval_loss_before"]
    folder = Path(trained["path"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token != tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer("def add_7(a, b):\n    return", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(answer[0]).startswith("def add_7(a, b):\n    return a + b +")

    tuned = command.run(stages_of(base=trained["id"], max_steps=2))
    assert tuned["base"] == trained["id"]


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral", "phi", "phi3"])
def test_other_architectures_train_and_merge(family: str, stages_of: StagesOf) -> None:
    result = command.run(stages_of(family))
    trained, tuned = result["trained"], result["tuned"]
    assert trained["eval_loss_after"] < trained["eval_loss_before"]
    assert tuned["kl_nats"]["original"] <= 1e-4 and tuned["same_top_share"]["original"] > 0.99


@pytest.mark.parametrize("change", [
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    {"gradient_checkpointing": True},
    {"lora": {"use_rslora": True, "target_modules": ["q_proj", "mlp.up_proj"]}},
    {"optim": "adamw_8bit"},
    {"lora": {"loraplus_lr_ratio": 4.0}},
    {"neftune_noise_alpha": 5.0},
])  # fmt: skip
def test_settings_that_must_still_learn(change: dict[str, Any], stages_of: StagesOf) -> None:
    result = command.run(stages_of(merge=False, **change))["trained"]
    assert result["eval_loss_after"] < result["eval_loss_before"]
    if "target_modules" in change.get("lora", {}):
        assert result["adapted_layers"] == "q_proj x 2, up_proj x 2"


def test_a_training_that_no_longer_helps_ends_with_its_best_weights(stages_of: StagesOf) -> None:
    """At such a learning rate the loss falls, then rises."""
    settings = {"learning_rate": 0.2, "max_steps": 40, "eval_steps": 2, "merge": False,
                "warmup_steps": 4, "lr_scheduler_type": "constant_with_warmup"}  # fmt: skip
    stages = stages_of(early_stopping_patience=3, load_best_model_at_end=True, **settings)
    trained = command.run(stages)["trained"]
    lines = [json.loads(line) for line in (Path(trained["path"]) / "metrics.jsonl").open()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert trained["best_step"] == best > 0 and trained["steps"] == best + 3 * 2 < 40
    assert trained["eval_loss_after"] == losses[best] < losses[trained["steps"]]
    assert held_out_loss(stages, trained) == pytest.approx(losses[best], rel=1e-4)


def break_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def poison_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "newest"}))


def encoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


@pytest.mark.parametrize(("damage", "train", "error", "words"), [
    (None, {"lora": {"target_modules": ["query"]}}, ModelError,
     'target_modules: "query" matches no linear layer; there are q_proj x 2'),
    (None, {"model": {"dtype": "float16"}}, ModelError, "float16 cannot be trained on a CPU"),
    (None, {"data": {"max_length": 5}}, DataError, "raise data.max_length"),
    (None, {"optim": "paged_adamw_8bit"}, Exception, "use adamw_8bit on a CPU"),
    (no_template, {}, ModelError, "has no chat template"),
    (break_weights, {}, ModelError, "1 weights .* model.layers.1.mlp.up_proj.weight first"),
    (poison_weights, {}, ModelError, "not finite"),
    (unknown_architecture, {}, ModelError, "cannot load it as a causal language model"),
    (encoder, {}, ModelError, "cannot load it as a causal language model"),
])  # fmt: skip
def test_what_cannot_be_trained_is_said_before_training(
    damage: Callable[[Path], None] | None,
    train: dict[str, Any],
    error: type[Exception],
    words: str,
    stages_of: StagesOf,
    base_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base_of("llama"), folder)
    if damage:
        damage(folder)
    stages = stages_of(folder, **train)
    with pytest.raises(error, match=words):
        command.run(stages)
    assert not stages.store.find(stages.trained.id)
