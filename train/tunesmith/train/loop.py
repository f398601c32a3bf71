"""The training loop: step, report, evaluate, save.

The number of a step decides its rows, and the loss of a step is normalised over all learnt tokens
of its rows, so the split into passes and ranks changes memory and speed but not the result.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from tunesmith.config.errors import TunesmithError, WorkInterrupted
from tunesmith.config.schema.train import Train
from tunesmith.terminal import Bar, log, progress_bar
from tunesmith.train.batches import Order, Rows, choose_rows, count_steps, every
from tunesmith.train.checkpoint import Checkpoints
from tunesmith.train.devices import in_gib, peak_memory_bytes
from tunesmith.train.examples import Examples
from tunesmith.train.loss import TokenLoss
from tunesmith.train.metrics import MetricsLog
from tunesmith.train.optimizer import make_optimizer, make_schedule
from tunesmith.train.preflight import largest_passes, nothing_learnt, within_memory
from tunesmith.train.progress import Progress
from tunesmith.train.sharding import whole
from tunesmith.train.side import Layout, Side
from tunesmith.train.signals import Stop, stop_on_signals

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Job:
    """What the loop trains, on what and how."""

    model: TokenLoss
    train: Examples
    evaluation: Examples
    layout: Layout
    settings: Train
    dtype: torch.dtype
    seed: int
    scratch: Path
    """Checkpoints and metrics, kept across kills."""


class Trainer:
    """One training, from its beginning or its latest checkpoint to its end."""

    def __init__(self, job: Job, accelerator: Any) -> None:
        self.accelerator, self.settings = accelerator, job.settings
        self._rank, self._ranks = accelerator.process_index, accelerator.num_processes
        self._seed, self._scratch, settings = job.seed, job.scratch, job.settings
        self._train, self._held_out = (
            Side(examples, layout, settings.preference, accelerator, job.seed)
            for examples, layout in (
                (job.train, job.layout),
                (job.evaluation, Layout(job.layout.as_documents)),
            )
        )
        self._order = Order(
            self._train.groups.lengths,
            settings.per_device_train_batch_size
            * settings.gradient_accumulation_steps
            * self._ranks,
            job.seed,
        )
        self.total_steps = count_steps(
            settings.num_train_epochs, settings.max_steps, self._order.steps_per_epoch
        )
        optimizer = make_optimizer(job.model, settings, accelerator.device)
        self._schedule = make_schedule(optimizer, settings, self.total_steps)
        self._scaler = torch.amp.GradScaler(
            accelerator.device.type, enabled=job.dtype == torch.float16
        )
        is_sharded = isinstance(job.model, FSDPModule)
        self._model = job.model if is_sharded else accelerator.prepare(job.model)
        self._optimizer = accelerator.prepare(optimizer)
        self._weights = [weight for weight in self._model.parameters() if weight.requires_grad]
        if self._ranks > 1 and not is_sharded:
            self._settle_rounding()
        torch.manual_seed(job.seed + self._rank)

        self._checkpoints = Checkpoints(job.scratch, accelerator)
        self.progress = Progress()
        self._window_sums = self._train.no_sums()
        self._note = ""

    def run(self) -> Progress:
        """Train to the end. Raises WorkInterrupted, after a checkpoint, when asked to stop."""
        self._restore()
        resumed = self.progress.step or None
        self._since = time.monotonic() - self.progress.elapsed_s
        with (
            contextlib.closing(MetricsLog(self._scratch / METRICS_FILE, resumed))
            if self.accelerator.is_main_process
            else contextlib.nullcontext() as self._metrics,
            contextlib.closing(self._checkpoints),
            stop_on_signals() as stop,
            progress_bar("training", self.total_steps) as bar,
        ):
            self._compare_with_start()
            bar.advance(self.progress.step)
            if not resumed:
                if self.settings.preflight:
                    self._preflight()
                self._evaluate()
            while self.progress.step < self.total_steps and not self._has_stalled:
                gradient_norm = self.advance()
                self._report(gradient_norm, bar)
                if self._due(self.settings.eval_steps):
                    self._evaluate()
                self._save(stop)
            self._checkpoints.wait()
        progress = self.progress
        if progress.step < self.total_steps and self.accelerator.is_main_process:
            log(f"stopping early: the lowest held-out loss was at step {progress.best_step}")
        if self.settings.load_best_model_at_end:
            self._checkpoints.load_best(self._trained)
        return progress

    def advance(self) -> torch.Tensor:
        """One optimizer step over what is next; returns the norm of the gradient."""
        return self._step(self._order.groups(self.progress.step))

    @property
    def next_rows(self) -> Rows:
        """The rows of all ranks that the next step sees."""
        return self._train.groups.rows_of(self._order.groups(self.progress.step))

    def take_window(self) -> tuple[dict[str, float], float]:
        """The objective's figures, and learnt tokens per second, since the last call."""
        started, progress = time.monotonic(), self.progress
        figures = self._train.named(
            self.accelerator.reduce(self._window_sums), progress.window_count
        )
        # A GPU may still have been at work on the last steps.
        waited_s = time.monotonic() - started
        progress.train_s += waited_s
        tokens, seconds = progress.window_tokens, progress.window_s + waited_s
        self._window_sums.zero_()
        progress.window_count = progress.window_tokens = 0
        progress.window_s = 0.0
        return figures, tokens / seconds

    def _step(self, groups: Rows) -> torch.Tensor:
        """One optimizer step over the groups of all ranks; returns the norm of the gradient."""
        started = time.monotonic()
        self._model.train()
        rows = self._train.groups.rows_of(groups)
        count = self._train.count(rows)
        turns = self._train.passes(groups, self.settings.per_device_train_batch_size)
        for at, shares in enumerate(turns):
            is_last = at == len(turns) - 1
            # Gradients are averaged over ranks, once, in the last pass; where they are sharded in
            # every pass, because a rank has no room for whole ones.
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self._model):
                sums = self._train.sums(self._model, shares[self._rank])
                self._scaler.scale(sums[0] * (self._ranks / count)).backward()
            self._window_sums += sums.detach()
        self._scaler.unscale_(self._optimizer)
        limit = self.settings.max_grad_norm or math.inf
        norm = whole(torch.nn.utils.clip_grad_norm_(self._weights, limit))
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        self._optimizer.zero_grad()
        seconds = time.monotonic() - started
        progress = self.progress
        progress.step += 1
        progress.train_s += seconds
        progress.window_s += seconds
        supervised = self._train.supervised(rows)
        progress.window_count += count
        progress.window_tokens += supervised
        progress.supervised_tokens += supervised
        progress.tokens += int(self._train.groups.lengths[groups].sum())
        progress.slots += self._train.slots(groups, turns)
        return norm

    def _preflight(self) -> None:
        """Do once what takes the most memory and room on the disk; nothing of it stays."""
        settings, started = self.settings, time.monotonic()
        folder = self._scratch / "preflight"
        with (
            within_memory(),
            nothing_learnt(self._weights, self._optimizer, self._scaler),
            contextlib.closing(Checkpoints(folder, self.accelerator)) as checkpoints,
        ):
            steps = (self._order.groups(step) for step in range(self.total_steps))
            self._model.train()
            for rows in largest_passes(self._train, steps, settings.per_device_train_batch_size):
                sums = self._train.sums(self._model, rows)
                self._scaler.scale(sums[0] / self._train.count(rows)).backward()
                self._scaler.unscale_(self._optimizer)
                self._scaler.step(self._optimizer)
                self._scaler.update()
                self._optimizer.zero_grad()
            self._model.eval()
            held = [choose_rows(len(self._held_out.groups), settings.max_eval_rows, self._seed)]
            with torch.no_grad():
                size = settings.per_device_eval_batch_size
                for rows in largest_passes(self._held_out, held, size):
                    self._held_out.sums(self._model, rows)
            checkpoints.save(0, self._trained, self._parts, asdict(self.progress))
            checkpoints.wait()
        if self.accelerator.is_main_process:
            shutil.rmtree(folder)
            peak = in_gib(peak_memory_bytes(self.accelerator.device))
            log(f"preflight: {time.monotonic() - started:.1f} s, peak memory {peak:.2f} GiB")

    def _report(self, gradient_norm: torch.Tensor, bar: Bar) -> None:
        """Write a line of metrics every few steps, and stop a training that has gone wrong."""
        progress = self.progress
        if self._due(self.settings.logging_steps):
            figures, tokens_per_s = self.take_window()
            progress.final_loss = figures["loss"]
            if not math.isfinite(progress.final_loss):
                raise TunesmithError(
                    f"the loss is {progress.final_loss} at step {progress.step}; lower "
                    "train.learning_rate, or lengthen train.warmup_steps"
                )
            self._write(
                step=progress.step,
                **figures,
                learning_rate=self._schedule.get_last_lr()[0],
                grad_norm=gradient_norm.item(),
                supervised_tokens_per_s=round(tokens_per_s, 1),
                elapsed_s=round(time.monotonic() - self._since, 3),
            )
            self._note = f"loss {progress.final_loss:.3f}, {tokens_per_s:,.0f} supervised tok/s"
        bar.advance(1, self._note)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Loss on held-out rows."""
        self._model.eval()
        side, settings = self._held_out, self.settings
        chosen = choose_rows(len(side.groups), settings.max_eval_rows, self._seed)
        count, total = 0, side.no_sums()
        for shares in side.passes(chosen, settings.per_device_eval_batch_size):
            total += side.sums(self._model, shares[self._rank])
            count += side.count(np.concatenate(shares))
        figures = side.named(self.accelerator.reduce(total), count)
        loss = figures["loss"]
        self.progress.eval_figures = figures
        self.progress.eval_losses.append(loss)
        if self.progress.evaluations_since_best == 0:
            self.progress.best_step = self.progress.step
            if self.settings.load_best_model_at_end:
                self._checkpoints.save_best(self._trained)
        self._write(
            step=self.progress.step,
            **{f"eval_{name}": value for name, value in figures.items()},
        )
        if self.accelerator.is_main_process:
            said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            log(f"step {self.progress.step}/{self.total_steps}: held-out {said}")

    def _settle_rounding(self) -> None:
        """After its first backward pass DDP orders gradients anew, and their order decides how
        sums over ranks are rounded. It is done before the first step, so that a resumed training
        rounds like one that never stopped."""
        self._model.train()
        self._train.sums(self._model, np.empty(0, dtype=np.int64))[0].backward()
        self._optimizer.zero_grad()

    def _save(self, stop: Stop) -> None:
        """Write a checkpoint when one is due or somebody on any rank asked to stop."""
        stopping, failed = self._any_rank(stop.requested, self._checkpoints.has_failed)
        if failed:
            self._checkpoints.wait()
        if not stopping and not self._due(self.settings.save_steps):
            return
        progress = self.progress
        progress.window_sums = self.accelerator.reduce(self._window_sums).tolist()
        progress.elapsed_s = time.monotonic() - self._since
        self._checkpoints.save(progress.step, self._trained, self._parts, asdict(progress))
        if stopping:
            self._checkpoints.wait()
            raise WorkInterrupted(
                f"stopped after step {progress.step} of {self.total_steps}, which is saved; "
                "run the same command again to resume"
            )

    def _restore(self) -> None:
        checkpoint = self._checkpoints.latest()
        if checkpoint is None:
            return
        state = self._checkpoints.restore(checkpoint, self._trained, self._parts)
        self.progress = Progress(**state)
        if self.accelerator.is_main_process:
            self._window_sums.copy_(torch.tensor(self.progress.window_sums))
            log(f"resuming after step {self.progress.step} of {self.total_steps}")

    def _compare_with_start(self) -> None:
        """Keep what the model says of every row before the first step, where the objective needs
        it."""
        size = self.settings.per_device_eval_batch_size
        for name, side in (("train", self._train), ("evaluation", self._held_out)):
            if side.objective.needs_reference:
                side.compare_with(
                    self._model, size, self._scratch / f"reference-{name}.safetensors"
                )

    @property
    def _has_stalled(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _any_rank(self, *wishes: bool) -> Sequence[bool]:
        """For each, whether it is true on any rank."""
        if self._ranks == 1:
            return wishes
        counts = torch.tensor(wishes, dtype=torch.int64, device=self.accelerator.device)
        return [count > 0 for count in self.accelerator.reduce(counts).tolist()]

    def _due(self, interval: float) -> bool:
        step = self.progress.step
        return step % every(interval, self.total_steps) == 0 or step == self.total_steps

    def _write(self, **figures: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(**figures)
        self.accelerator.log(figures, step=figures["step"])

    @property
    def _trained(self) -> Any:
        return self.accelerator.unwrap_model(self._model)

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "optimizer": self._optimizer,
            "schedule": self._schedule,
            "scaler": self._scaler,
        }
