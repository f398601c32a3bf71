"""A preflight does what the training will do, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.config import GateError
from tunesmith.pipeline import Stages
from tunesmith.train import command
from tunesmith.train.preflight import largest_passes, within_memory
from tunesmith.train.side import Layout, Side


@pytest.mark.parametrize("settings", [
    {"lora": {"lora_dropout": 0.2}, "gradient_accumulation_steps": 2},
    {"method": "full", "optim": "adamw_8bit"},
    {"method": "qlora", "packing": True, "per_device_train_batch_size": 2},
])  # fmt: skip
def test_the_result_is_the_same_to_the_bit(
    settings: dict[str, Any], stages_of: Callable[..., Stages], capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for preflight in (False, True):
        stages = stages_of(store=f"store-{preflight}", preflight=preflight, merge=False, **settings)
        assert command.run(stages)
        assert ("preflight:" in capsys.readouterr().err) is preflight
        artifact = stages.store.find(stages.trained.id)
        assert artifact and not list(stages.store.folder.rglob("preflight"))
        weights = next(artifact.root.glob("*model.safetensors"))
        found.append((artifact.id, artifact.manifest.files[weights.name].sha256))
    assert found[0] == found[1]


class Rows:
    """As much of Examples as the sizes of passes need."""

    def __init__(self, lengths: list[int], learnt: list[int]) -> None:
        self.rows = [None] * len(lengths)
        self._lengths, self._learnt = np.array(lengths), np.array(learnt)

    def lengths(self) -> Any:
        return self._lengths

    def supervised(self) -> Any:
        return self._learnt


def test_the_largest_passes_are_tried() -> None:
    from accelerate import Accelerator

    rows: Any = Rows([9, 2, 3, 30, 4, 5], [1, 1, 2, 3, 2, 4])
    side = Side(rows, Layout(), None, Accelerator(cpu=True), 0)
    steps = [np.array([0, 1]), np.array([2, 3]), np.array([4, 5])]
    found = [sorted(rows.tolist()) for rows in largest_passes(side, steps, 2)]
    assert found == [[2, 3], [4, 5]]


def test_what_is_too_large_is_refused_with_what_would_take_less() -> None:
    with (
        pytest.raises(GateError, match=r"does not fit.*gradient_accumulation_steps"),
        within_memory(),
    ):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="another fault"), within_memory():
        raise RuntimeError("another fault")
