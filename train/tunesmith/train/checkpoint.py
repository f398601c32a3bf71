"""Checkpoints of a training: all that a resumed run needs, and never a frozen weight.

FOLDER/step-00000120/weights.safetensors   trainable weights
                     state.pt              optimizer, schedule, gradient scaler, progress
                     random-0.pt           random number generators, one file per rank
       best.safetensors                    trainable weights of the lowest held-out loss
A checkpoint is written beside its place and renamed: one that has its name is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunesmith.ledger.durable import sync, sync_tree

_WEIGHTS, _STATE, _BEST = "weights.safetensors", "state.pt", "best.safetensors"


class Stateful(Protocol):
    """Whatever keeps its state in a dictionary, as torch's optimizers and schedules do."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take it back."""


class Checkpoints:
    """The checkpoints of one run; only the latest is kept."""

    def __init__(self, folder: Path, accelerator: Any) -> None:
        self._folder = folder
        self._accelerator = accelerator

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return max(self._folder.glob("step-????????"), default=None)

    def save(
        self,
        step: int,
        model: nn.Module,
        parts: Mapping[str, Stateful],
        progress: dict[str, Any],
    ) -> None:
        """Write a checkpoint, then drop the older ones. Called on every rank."""
        final = self._folder / f"step-{step:08d}"
        if self.latest() == final:  # a stop was asked for right after it was saved
            return
        aside = self._folder / "writing"
        is_main = self._accelerator.is_main_process
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_file(trainable_weights(model), aside / _WEIGHTS)
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**states, "progress": progress}, aside / _STATE)
        self._accelerator.wait_for_everyone()
        torch.save(_random_state(), aside / self._random_file)
        self._accelerator.wait_for_everyone()
        if is_main:
            sync_tree(aside)
            older = list(self._folder.glob("step-????????"))
            os.rename(aside, final)
            for path in older:
                shutil.rmtree(path)
        self._accelerator.wait_for_everyone()

    def restore(
        self, checkpoint: Path, model: nn.Module, parts: Mapping[str, Stateful]
    ) -> dict[str, Any]:
        """Put a checkpoint back; returns the progress it was saved with."""
        load_trainable_weights(model, load_file(checkpoint / _WEIGHTS))
        state = torch.load(checkpoint / _STATE, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        _set_random_state(torch.load(checkpoint / self._random_file, weights_only=True))
        progress: dict[str, Any] = state["progress"]
        return progress

    def save_best(self, model: nn.Module) -> None:
        """Keep these weights as the best ones so far. Called on every rank."""
        if self._accelerator.is_main_process:
            self._folder.mkdir(parents=True, exist_ok=True)
            aside = self._folder / f"writing-{_BEST}"
            save_file(trainable_weights(model), aside)
            sync(aside)
            os.replace(aside, self._folder / _BEST)
        self._accelerator.wait_for_everyone()

    def load_best(self, model: nn.Module) -> None:
        """Put the best weights back. Called on every rank."""
        load_trainable_weights(model, load_file(self._folder / _BEST))

    @property
    def _random_file(self) -> str:
        return f"random-{self._accelerator.process_index}.pt"


def trainable_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name → weight, for every weight that is trained."""
    return {
        name: weight.detach().contiguous()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def load_trainable_weights(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Set every trained weight in place."""
    present = trainable_weights(model)
    assert present.keys() == saved.keys(), "the checkpoint is of another model"
    for name, weight in present.items():
        weight.copy_(saved[name])


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
