"""Whether a training fits its device, and the nearest change with which it would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tunesmith.config.errors import GateError, ModelError
from tunesmith.config.schema import Recipe
from tunesmith.config.schema.train import Train
from tunesmith.terminal import log
from tunesmith.train import model as models
from tunesmith.train.batches import Groups, Order, Rows, choose_rows, count_steps, passes
from tunesmith.train.devices import Device, in_gib, larger_devices
from tunesmith.train.examples import Examples
from tunesmith.train.heap import loose_bytes
from tunesmith.train.loss import beginning, round_up
from tunesmith.train.memory import Parts, Pass, Workload, simulate

FILES, LOOSE = "files", "loose"
_SHORTEST_TOKENS = 64
_GUESSED_BYTES_PER_WEIGHT, _GUESSED_BYTES_PER_VALUE, _GUESSED_BYTES_PER_SCORE = 24, 128, 16
"""Generous: of sixteen trainings none had over 40 bytes per token, layer and value of its widest
part."""

_READ_BYTES = 2**16
"""What Linux maps of a file around a page that is read (fault_around_bytes)."""

_NOT_SIMULATED = (
    ModelError,
    RuntimeError,
    NotImplementedError,
    AttributeError,
    ValueError,
    TypeError,
)


Change = dict[str, Any]
"""Keys of the recipe → other values."""


@dataclass(frozen=True)
class Forecast:
    """Peak memory of a training on one device."""

    device: Device

    parts: Parts
    """Part → bytes at the peak."""

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the device has so much; the system takes pages of files back when it has to."""
        return self.peak_bytes - self.parts.get(FILES, 0) <= self.device.memory_bytes

    def in_gib(self) -> dict[str, float]:
        """Part → GiB."""
        return {part: in_gib(size) for part, size in self.parts.items()}


class Forecaster:
    """Forecasts for one base and its data, under the recipe's settings or changed ones."""

    def __init__(
        self,
        recipe: Recipe,
        config: Any,
        examples: Examples,
        held_out: Examples,
        device: Device,
    ) -> None:
        assert recipe.train
        self._recipe, self._config, self._device = recipe, config, device
        self._train, self._examples, self._held_out = recipe.train, examples, held_out
        self._sides = (examples, held_out)

    def forecast(
        self, train: Train | None = None, max_length: int | None = None
    ) -> Forecast | None:
        """Peak memory; `max_length` cuts the sequences, in tokens.

        None, with the reason in the log, where a model's code looks at the values of its tensors
        or an adapter cannot be put on it; training says more about the latter.
        """
        train = train or self._train
        if train.sharding == "full" or train.base_precision == "fp8":
            log("the peak memory of divided and FP8 models is not predicted")
            return None
        dtype = getattr(torch, self._recipe.model.dtype)
        work = self._workload(train, max_length)
        try:
            model = empty_model(self._recipe.model_copy(update={"train": train}), self._config)
            parts = simulate(model, train, dtype, work)
        except _NOT_SIMULATED as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            log(f"the peak memory is not predicted: {reason}")
            return None
        if self._device.type == "cpu" and train.method != "pretrain":
            parts = self._with_files(parts, train, dtype)
        found = {part: size for part, size in parts.items() if size}
        found["runtime"] = self._device.runtime_bytes
        if self._device.type == "cpu":
            found[LOOSE] = loose_bytes(sum(found.values()))
        return Forecast(self._device, found)

    def refuse_what_cannot_fit(self, forecast: Forecast) -> None:
        """Raise GateError with the nearest change that would fit, when this does not."""
        if forecast.fits:
            return
        parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in forecast.parts.items())
        message = (
            f"the training does not fit: it needs {forecast.peak_bytes / 2**30:.2f} GiB ({parts}), "
            f"and {self._device.name} has {self._device.memory_bytes / 2**30:.2f} GiB"
        )
        raise GateError(
            f"{message}; {self._advice(forecast)}; train.preflight=true has it tried instead"
        )

    def is_far_below(self) -> bool:
        """Whether a generous guess, which takes no time, stays below half of the device."""
        try:
            guess = self._guess_bytes()
        except _NOT_SIMULATED:  # loading the model says what is wrong with it
            return False
        return guess + self._device.runtime_bytes < self._device.memory_bytes / 2

    def _guess_bytes(self) -> int:
        text = self._config.get_text_config()
        work = self._workload(self._train, None)
        heads = int(text.num_attention_heads)
        inner = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
        inner *= int(getattr(text, "num_experts_per_tok", None) or 1)
        widest = max(int(text.hidden_size), inner, heads * int(getattr(text, "head_dim", 0) or 0))
        weights: int = sum(one.numel() for one in self._empty(self._train, "full").parameters())
        return _GUESSED_BYTES_PER_WEIGHT * weights + max(
            one.rows * one.width * int(text.num_hidden_layers)
            * (_GUESSED_BYTES_PER_VALUE * widest + _GUESSED_BYTES_PER_SCORE * heads * one.width)
            for one in (*work.train, *work.evaluation)
        )  # fmt: skip

    def _advice(self, forecast: Forecast) -> str:
        for changes in self._changes():
            # The last one takes the least: where it does not fit, none does.
            if self._size(changes[-1]) is None:
                continue
            for change in changes:
                if size := self._size(change):
                    settings = " ".join(f"{key}={value}" for key, value in change.items())
                    return f"this would take {size / 2**30:.2f} GiB: {settings}"
        larger = larger_devices(forecast.peak_bytes)
        return f"it would fit: {', '.join(larger)}" if larger else "no single known GPU has so much"

    def _size(self, change: Change) -> int | None:
        """Peak memory with other settings, where that fits."""
        changed = self._recipe.model_dump()
        for key, value in change.items():
            section, name = key.split(".")
            changed[section][name] = value
        recipe = Recipe.model_validate(changed)
        assert recipe.train and recipe.data
        found = self.forecast(recipe.train, recipe.data.max_length)
        return found.peak_bytes if found and found.fits else None

    def _changes(self) -> Iterator[list[Change]]:
        """From those that leave the result as it is to those that change more and more."""
        train = self._train
        wanted: list[Change] = [{}, {"train.gradient_checkpointing": "true"}]
        if train.optim.startswith("adamw_torch"):
            wanted.append({"train.optim": "adamw_8bit"})
        if train.method == "lora" and not train.lora.changes_base:
            wanted.append({"train.method": "qlora"})
        made: Change = {}
        for change in wanted:
            made = made | change
            yield [made | split for split in _splits(train)]
        smallest, length = made | _splits(train)[-1], int(self._examples.lengths().max())
        while (length := length // 2) >= _SHORTEST_TOKENS:
            yield [smallest | {"data.max_length": length}]

    def _workload(self, train: Train, max_length: int | None) -> Workload:
        limit = max_length or int(self._examples.lengths().max())
        lengths, learnt = self._lengths(self._examples, limit)
        assert self._recipe.data
        capacity = max_length or self._recipe.data.max_length
        groups = Groups.of_training(lengths, train, capacity, self._recipe.seed)
        per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
        order = Order(groups.lengths, per_step * train.processes, self._recipe.seed)
        steps = count_steps(train.num_train_epochs, train.max_steps, order.steps_per_epoch)
        found = (
            groups.rows_of(share)
            for step in range(steps)
            for shares in passes(
                order.groups(step),
                groups.lengths,
                train.per_device_train_batch_size,
                train.processes,
            )
            for share in shares
        )
        held_lengths, held_learnt = self._lengths(self._held_out, limit)
        held = Groups.of(held_lengths, 2 if train.preference else 1)
        evaluated = passes(
            choose_rows(len(held), train.max_eval_rows, self._recipe.seed),
            held.lengths,
            train.per_device_eval_batch_size,
            train.processes,
        )
        back_to_back = self._device.type == "cuda" and not train.neftune_noise_alpha
        is_flat = train.packing or back_to_back
        held_rows = (held.rows_of(share) for shares in evaluated for share in shares)
        checked = len(beginning(self._examples.rows[0]).input_ids) - 1
        return Workload(
            _largest(_sizes(found, lengths, learnt, is_flat)),
            _largest(_sizes(held_rows, held_lengths, held_learnt, is_flat)),
            Pass(1, checked, checked),
            accumulates=train.gradient_accumulation_steps > 1,
        )

    def _lengths(self, examples: Examples, limit: int) -> tuple[Rows, Rows]:
        return (
            np.minimum(examples.lengths(), limit),
            np.minimum(examples.supervised(), limit - 1),
        )

    def _with_files(self, parts: Parts, train: Train, dtype: torch.dtype) -> Parts:
        """A CPU has the base's files mapped: for good where weights are used in place, otherwise
        while others are made of them."""
        stored = getattr(self._config, "dtype", None) or torch.float32
        frozen = [one for one in self._empty(train, "lora").parameters() if not one.requires_grad]
        whole = sum(weight.numel() for weight in frozen) * stored.itemsize
        if train.method == "lora" and frozen[0].dtype == stored:
            return parts | {"weights": parts["weights"] - self._never_read_bytes(stored)}
        if train.method == "qlora" and stored == dtype:
            never_read = self._never_read_bytes(stored)
            unpacked = sum(
                weight.numel()
                for weight in self._empty(train, "qlora").parameters()
                if not weight.requires_grad and type(weight).__name__ != "Params4bit"
            )
            return parts | {
                "weights": parts["weights"] - never_read,
                FILES: whole - unpacked * stored.itemsize,
            }
        if parts["weights"] + whole > sum(parts.values()):
            return {"weights": parts["weights"], FILES: whole}
        return parts

    def _never_read_bytes(self, stored: torch.dtype) -> int:
        """What stays in the file of the input embedding: all but the vectors of tokens that occur,
        and what the system brings along with them."""
        text = self._config.get_text_config()
        if text.tie_word_embeddings:
            return 0
        vector = text.hidden_size * stored.itemsize
        used = [side.used_ids() * vector // _READ_BYTES for side in self._sides if side.rows]
        whole = int(text.vocab_size * vector)
        return max(0, whole - len(np.unique(np.concatenate(used))) * _READ_BYTES)

    def _empty(self, train: Train, method: str) -> Any:
        changed = train.model_copy(update={"method": method})
        return empty_model(self._recipe.model_copy(update={"train": changed}), self._config)


def empty_model(recipe: Recipe, config: Any) -> Any:
    """The model as it is trained, on the meta device."""
    from transformers import AutoModelForCausalLM

    assert recipe.train
    train, dtype = recipe.train, getattr(torch, recipe.model.dtype)
    is_adapter = train.method in ("lora", "qlora")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype if is_adapter and not train.lora.changes_base else torch.float32,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        if train.method == "qlora":
            models.pack_empty(model, dtype)
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if is_adapter:
            # Where it starts makes no difference, and a decomposition would need the weights.
            model = models.add_adapter(
                model, train.lora.model_copy(update={"init_lora_weights": "zeros"})
            )
    if train.neftune_noise_alpha:
        models.add_noise(model, train.neftune_noise_alpha)
    return model


def _splits(train: Train) -> list[Change]:
    """The same rows per step in smaller and smaller passes."""
    rows, count = train.per_device_train_batch_size, train.gradient_accumulation_steps
    found: list[Change] = [{}]
    while rows % 2 == 0:
        rows, count = rows // 2, count * 2
        found.append(
            {
                "train.per_device_train_batch_size": rows,
                "train.gradient_accumulation_steps": count,
                "train.per_device_eval_batch_size": min(train.per_device_eval_batch_size, rows),
            }
        )
    return found


def _sizes(passes_made: Iterator[Rows], lengths: Rows, learnt: Rows, is_flat: bool) -> list[Pass]:
    """The size of every pass; rows are padded, or stand back to back in one."""
    sizes = []
    widest = int(lengths.max())
    for rows in passes_made:
        if len(rows) == 0:
            continue
        targets, tokens = int(learnt[rows].sum()), lengths[rows] - 1
        longest = int(tokens.max())
        width = max(longest, min(round_up(longest), widest))
        sizes.append(
            Pass(1, round_up(int(tokens.sum())), targets)
            if is_flat
            else Pass(len(rows), width, targets)
        )
    return sizes


def _largest(sizes: list[Pass]) -> tuple[Pass, ...]:
    """The pass with the most tokens and the one with the most learnt tokens, often the same."""
    orders: list[Callable[[Pass], Any]] = [
        lambda one: (one.rows * one.width, one.targets),
        lambda one: (one.targets, one.rows * one.width),
    ]
    return tuple({max(sizes, key=order): None for order in orders})
