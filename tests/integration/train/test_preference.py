"""Preference tuning lowers the published losses, against a reference that is computed once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sequences import make_examples
from transformers import AutoModelForCausalLM

from tunesmith.config import Recipe, WorkInterrupted
from tunesmith.config.schema.train import Preference
from tunesmith.ledger import hash_file
from tunesmith.pipeline import Stages
from tunesmith.train import command
from tunesmith.train.batches import Rows
from tunesmith.train.language import EVALUATION_FILE, read_language
from tunesmith.train.loop import Trainer
from tunesmith.train.loss import TokenLoss, collate
from tunesmith.train.objective import make_objective
from tunesmith.train.ranks import join
from tunesmith.train.side import Side
from tunesmith.train.stage import train_stage

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def preferences(tmp_path: Path) -> dict[str, Any]:
    """Prefer the right sum."""
    rows = [
        {
            "prompt": f"What is {at} plus {at}?",
            "chosen": f"{at} plus {at} is {2 * at}." * (1 + at % 3),
            "rejected": f"Nobody knows {at}, {at % 7}.",
        }
        for at in range(60)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(path), "format": "preference", "max_length": 64}


@torch.no_grad()
def log_probability(model: Any, ids: list[int], learnt: list[bool]) -> torch.Tensor:
    """Of the learnt tokens of one sequence, from the model's full logits."""
    logits_SV = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    found_S = logits_SV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return found_S[torch.tensor(learnt[1:])]


def test_the_losses_are_the_published_ones(base_of: Callable[[str], Path]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base_of("llama")).eval()
    examples = make_examples(6)
    tokens = [
        log_probability(model, row.input_ids.tolist(), row.learnt.tolist()) for row in examples
    ]
    batch = collate(examples)
    nats = TokenLoss(model, torch.float32)(batch.input_ids_BS, batch.positions_N, batch.targets_N)
    reference = torch.tensor([float(-part.sum()) for part in tokens]) + torch.randn(6)

    beta, doubt = 0.3, 0.1
    expected = margin = 0.0
    for at in (0, 2, 4):
        ratios = [tokens[at + side].sum() + reference[at + side] for side in (0, 1)]
        gap = beta * (ratios[0] - ratios[1])
        expected -= float((1 - doubt) * F.logsigmoid(gap) + doubt * F.logsigmoid(-gap))
        margin += float(gap)
    dpo = make_objective(Preference(beta=beta, label_smoothing=doubt))
    loss, accuracy, found = dpo.sums(nats, batch, reference.double()).tolist()
    assert (loss, found) == (pytest.approx(expected, rel=1e-4), pytest.approx(margin, rel=1e-3))
    assert accuracy in (0, 1, 2, 3) and dpo.count(6, 99) == 3

    expected = 0.0
    for at in (0, 2, 4):
        chosen, rejected = (part.mean().exp() for part in tokens[at : at + 2])
        odds = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
        expected += float(-chosen.log() - beta * torch.log(odds / (1 + odds)))
    orpo = make_objective(Preference(loss_type="orpo", beta=beta))
    assert orpo.sums(nats, batch, None)[0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "loss_type"), [("lora", "dpo"), ("full", "dpo"), ("lora", "orpo")]
)
def test_the_chosen_answer_becomes_likelier(
    method: str, loss_type: str, stages_of: Callable[..., Stages], preferences: dict[str, Any],
    base_of: Callable[[str], Path],
) -> None:  # fmt: skip
    stages = stages_of(
        method=method, max_steps=20, learning_rate=2e-3, data=preferences, merge=False,
        preference={"loss_type": loss_type}, per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trained = command.run(stages)["trained"]
    assert trained["eval_loss_after"] < 0.8 * trained["eval_loss_before"]
    assert trained["eval_accuracy"] == 1.0 and trained["eval_margin"] > 0.0
    if loss_type == "dpo":
        assert trained["eval_loss_before"] == pytest.approx(0.693147, abs=1e-5)
    if method != "full":
        return
    # What the training says is what the saved model says, computed from nothing but its logits.
    base = AutoModelForCausalLM.from_pretrained(base_of("llama")).eval()
    tuned = AutoModelForCausalLM.from_pretrained(trained["path"]).eval()
    language = read_language(Path(trained["path"]), stages.recipe)
    assert stages.recipe.data
    rows = language.tokenise(stages.made(stages.dataset), EVALUATION_FILE, stages.recipe.data).rows
    losses = []
    for at in range(0, len(rows), 2):
        gained = [
            log_probability(model, rows[at + side].input_ids.tolist(), list(rows[at + side].learnt))
            for side in (0, 1)
            for model in (tuned, base)
        ]
        chosen, chosen_before, rejected, rejected_before = (float(part.sum()) for part in gained)
        gap = torch.tensor(0.1 * (chosen - chosen_before - rejected + rejected_before))
        losses.append(float(-F.logsigmoid(gap)))
    assert trained["eval_loss_after"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_stopped_preference_training_ends_the_same(
    recipe_of: Callable[..., Recipe], preferences: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "max_steps": 12, "data": preferences, "preference": {}, "lora": {"lora_dropout": 0.1},
    }  # fmt: skip
    compared: list[Path] = []
    compare = Side.compare_with

    def count(side: Side, model: Any, per_pass: int, path: Path) -> None:
        if not path.exists():
            compared.append(path)
        compare(side, model, per_pass, path)

    monkeypatch.setattr(Side, "compare_with", count)
    whole = train_stage(Stages(recipe_of(store="whole", **settings)), join())
    step = Trainer._step

    def step_and_stop(trainer: Trainer, groups: Rows) -> torch.Tensor:
        norm = step(trainer, groups)
        if trainer.progress.step in (3, 8):
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    monkeypatch.setattr(Trainer, "_step", step_and_stop)
    stages = Stages(recipe_of(store="cut", **settings))
    for _ in range(2):
        with pytest.raises(WorkInterrupted):
            train_stage(stages, join())
    cut = train_stage(stages, join())
    assert hash_file(cut.root / WEIGHTS) == hash_file(whole.root / WEIGHTS)
    assert len(compared) == 4  # both sides, once for each of the two trainings
