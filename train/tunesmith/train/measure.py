"""Steps of the real training loop under a clock, with their useful work and their memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.config.errors import ModelError
from tunesmith.train.devices import peak_memory_bytes
from tunesmith.train.loop import Job, Trainer
from tunesmith.train.useful import Layers, count_layers, synchronize

_SHOWN_OPERATIONS = 30


@dataclass(frozen=True)
class Round:
    """Some steps in a row, over all ranks."""

    seconds: float
    tokens: int
    """Of the rows, padding left out."""

    supervised_tokens: int
    useful_flops: float | None
    loss: float
    """Nats per learnt token."""

    grad_norm: float
    """Norm of the last step's gradient, before it is clipped."""


class Meter:
    """A training that goes on as long as it is measured."""

    def __init__(self, job: Job, accelerator: Any) -> None:
        self._trainer = Trainer(job, accelerator)
        self._examples, self._device = job.train, accelerator.device
        self._lengths, self._supervised = job.train.lengths(), job.train.supervised()
        self._layers: Layers | None = count_layers(job.model.model)

    def warm_up(self, steps: int) -> float:
        """Steps that do not count; returns their seconds, compilation with them."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self.round(steps).seconds

    def round(self, steps: int) -> Round:
        """Measure the next steps. Raises ModelError when the device's memory is too small."""
        seen = []
        with _says_what_to_do():
            synchronize(self._device)
            started_s = time.perf_counter()
            for _ in range(steps):
                seen.append(self._trainer.next_rows)
                norm = self._trainer.advance()
            synchronize(self._device)
            seconds = time.perf_counter() - started_s
        rows = [self._examples.rows[at] for step in seen for at in step]
        return Round(
            seconds=seconds,
            tokens=sum(int(self._lengths[step].sum()) for step in seen),
            supervised_tokens=sum(int(self._supervised[step].sum()) for step in seen),
            useful_flops=self._layers.useful_flops(rows) if self._layers else None,
            loss=self._trainer.take_window()[0]["loss"],
            grad_norm=float(norm),
        )

    def profile(self, steps: int) -> str:
        """Which operations the time of the next steps goes to, the longest first, as a table."""
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self._device.type == "cuda"
        activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
        with profile(activities=activities) as found:
            self.round(steps)
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        return str(found.key_averages().table(sort_by=order, row_limit=_SHOWN_OPERATIONS))

    @property
    def peak_memory_gib(self) -> float:
        """The most that was allocated on this GPU since the warm-up began; on a CPU the most that
        this process has held."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device) / 2**30)
        return peak_memory_bytes(self._device) / 2**30

    def leave_memory(self) -> None:
        """Give unused memory back, for another process on the same GPU."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _says_what_to_do() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            "a step does not fit into the GPU's memory; lower train.per_device_train_batch_size "
            "(and raise gradient_accumulation_steps), or set train.gradient_checkpointing: true"
        ) from error
