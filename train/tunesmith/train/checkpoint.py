"""Checkpoints of a training: all that a resumed run needs, and never a frozen weight.

FOLDER/step-00000120/weights.safetensors   trainable weights
                     state.pt              optimizer, schedule, gradient scaler, progress
                     random-0.pt           random number generators, one file per rank
       best.safetensors                    trainable weights of the lowest held-out loss
Both are written beside their place and renamed: what has its name is whole. A thread of the main
process writes them. Training on a GPU waits for the copy in host memory alone. Training on a CPU
waits until the system has the bytes, which takes about as long as a copy but no memory of its own;
that they reach the disk is waited for by the thread.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tunesmith.config.errors import TunesmithError
from tunesmith.ledger.durable import sync, sync_tree
from tunesmith.train.sharding import part, whole

_WEIGHTS, _STATE, _BEST = "weights.safetensors", "state.pt", "best.safetensors"
FOLDER = "checkpoints"
_NAMES = "step-????????"


class Stateful(Protocol):
    """Whatever keeps its state in a dictionary, as torch's optimizers and schedules do."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take it back."""


def newest(scratch: Path) -> Path | None:
    """The newest whole checkpoint in a training's scratch folder."""
    return max((scratch / FOLDER).glob(_NAMES), default=None)


class Checkpoints:
    """The checkpoints of one run; only the latest is kept. Every rank calls every method, and all
    of them read the same folder."""

    def __init__(self, scratch: Path, accelerator: Any) -> None:
        self._scratch, self._folder = scratch, scratch / FOLDER
        self._rank, self._is_main = accelerator.process_index, accelerator.is_main_process
        self._copies = accelerator.device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._saved_step: int | None = None

    def latest(self) -> Path | None:
        """The newest whole checkpoint, as the main process sees it."""
        found: list[Path | None] = broadcast_object_list([newest(self._scratch)])
        return found[0]

    def save(
        self,
        step: int,
        model: nn.Module,
        parts: Mapping[str, Stateful],
        progress: dict[str, Any],
    ) -> None:
        """Begin to write everything as it is now, once what was saved before is written; older
        checkpoints are dropped then."""
        if step == self._saved_step:  # a stop was asked for right after it was saved
            return
        self.wait()
        states = {name: part.state_dict() for name, part in parts.items()}
        state = _on_host({**states, "progress": progress}, self._is_main, self._copies)
        random = gather_object([random_state()])
        self._submit(self._write, step, self._weights(model), state, random)
        self._saved_step = step

    def save_best(self, model: nn.Module) -> None:
        """Begin to write these weights as the best ones so far, once what was saved before is
        written."""
        self.wait()
        self._submit(self._write_best, self._weights(model))

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        return whole_weights(model, self._is_main, self._copies)

    def _submit(self, write: Callable[..., None], *arguments: Any) -> None:
        if not self._is_main:
            return
        taken = Event()
        self._writing = self._thread.submit(_always_set, taken, write, *arguments)
        if not self._copies:
            taken.wait()

    @property
    def has_failed(self) -> bool:
        """Whether this process knows of a write that went wrong; `wait` then says what."""
        writing = self._writing
        return bool(writing and writing.done() and writing.exception())

    def wait(self) -> None:
        """Return when what was saved is on disk. Raises what writing it raised."""
        error: BaseException | None = None
        if self._writing:
            error, self._writing = self._writing.exception(), None
        [fault] = broadcast_object_list([error and f"{type(error).__name__}: {error}"])
        if error:
            raise error
        if fault:
            raise TunesmithError(f"the main process could not write a checkpoint: {fault}")

    def close(self) -> None:
        """Let a write come to its end, whatever ended the training."""
        self._thread.shutdown()

    def restore(
        self, checkpoint: Path, model: nn.Module, parts: Mapping[str, Stateful]
    ) -> dict[str, Any]:
        """Put a checkpoint back; returns the progress it was saved with."""
        load_trainable_weights(model, load_file(checkpoint / _WEIGHTS))
        state = torch.load(checkpoint / _STATE, weights_only=True, map_location="cpu")
        for name, stateful in parts.items():
            if isinstance(stateful, Optimizer):
                _divide(state[name], stateful)
            stateful.load_state_dict(state[name])
        set_random_state(torch.load(checkpoint / f"random-{self._rank}.pt", weights_only=True))
        progress: dict[str, Any] = state["progress"]
        return progress

    def load_best(self, model: nn.Module) -> None:
        """Put the best weights back, of all that was saved."""
        self.wait()
        load_trainable_weights(model, load_file(self._folder / _BEST))

    def _write(
        self,
        step: int,
        weights: dict[str, Tensor],
        state: dict[str, Any],
        random: Sequence[dict[str, Tensor]],
        taken: Event,
    ) -> None:
        aside, final = self._folder / "writing", self._folder / f"step-{step:08d}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(weights, aside / _WEIGHTS)
        torch.save(state, aside / _STATE)
        for rank, generators in enumerate(random):
            torch.save(generators, aside / f"random-{rank}.pt")
        taken.set()
        sync_tree(aside)
        older = list(self._folder.glob(_NAMES))
        os.rename(aside, final)
        sync(self._folder)
        for path in older:
            shutil.rmtree(path)

    def _write_best(self, weights: dict[str, Tensor], taken: Event) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._folder / f"writing-{_BEST}"
        save_file(weights, aside)
        taken.set()
        sync(aside)
        os.replace(aside, self._folder / _BEST)
        sync(self._folder)


def _always_set(taken: Event, write: Callable[..., None], *arguments: Any) -> None:
    """Write; who waits for the bytes to be taken does not wait for ever when that fails."""
    try:
        write(*arguments, taken)
    finally:
        taken.set()


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name → weight, for every weight that is trained."""
    return {
        name: weight.detach().contiguous()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def whole_weights(model: nn.Module, keep: bool, copy: bool = True) -> dict[str, Tensor]:
    """The trained weights in host memory, on the ranks that keep them, as a copy unless they are
    there already and none is asked for; called on every rank."""
    weights: dict[str, Tensor] = _on_host(trainable_weights(model), keep, copy)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return weights


def load_trainable_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Set every trained weight in place."""
    present = trainable_weights(model)
    assert present.keys() == saved.keys(), "the checkpoint is of another model"
    for name, weight in present.items():
        weight.copy_(part(saved[name], weight))


def _on_host(value: Any, keep: bool, copy: bool) -> Any:
    """Nested dictionaries and lists in host memory, with whole tensors, which are None unless kept;
    tensors that are there already are copied if asked for. Called on every rank."""
    if isinstance(value, Tensor):
        value = whole(value)
        if not keep:
            return None
        if not copy and not value.is_cuda:
            return value
        # Pinned memory is copied to at full speed, and torch uses it again for the next copy.
        found = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return found.copy_(value, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _on_host(inner, keep, copy) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_on_host(inner, keep, copy) for inner in value]
    return value


def _divide(state: dict[str, Any], optimizer: Optimizer) -> None:
    """Leave this rank's part of whole moments in an optimizer's state."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for at, moments in state["state"].items():
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == weights[at].shape:
                moments[name] = part(moment, weights[at])


def random_state() -> dict[str, Tensor]:
    """The states of this process's random number generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Have the generators go on from these states."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
