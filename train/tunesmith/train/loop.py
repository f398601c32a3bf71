"""The training loop: step, report, evaluate, save.

The number of a step decides its rows, and the loss of a step is normalised over all learnt tokens
of its rows, so the split into passes and ranks changes memory and speed but not the result.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.errors import TunesmithError, WorkInterrupted
from tunesmith.config.schema import Train
from tunesmith.terminal import Bar, log, progress_bar
from tunesmith.train.batches import Order, Rows, choose_rows, count_steps, every, passes
from tunesmith.train.checkpoint import Checkpoints
from tunesmith.train.examples import Example, Examples
from tunesmith.train.loss import TokenLoss, collate
from tunesmith.train.metrics import MetricsLog
from tunesmith.train.optimizer import make_optimizer, make_schedule
from tunesmith.train.signals import Stop, stop_on_signals

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Job:
    """What the loop trains, on what and how."""

    model: TokenLoss
    train: Examples
    evaluation: Examples
    settings: Train
    dtype: torch.dtype
    seed: int
    scratch: Path
    """Checkpoints and metrics, kept across kills."""


@dataclass
class Progress:
    """How far a training is; part of every checkpoint."""

    step: int = 0
    """Optimizer steps done."""

    train_s: float = 0.0
    """Seconds in steps, evaluation and saving left out."""

    elapsed_s: float = 0.0
    """Seconds in all, over every attempt."""

    supervised_tokens: int = 0
    window_nats: float = 0.0
    """Loss summed since the last report."""

    window_tokens: int = 0
    window_s: float = 0.0
    final_loss: float | None = None
    """Nats per learnt token in the last report."""

    eval_losses: list[float] = field(default_factory=list)
    """Nats per learnt held-out token, from before the first step to after the last."""

    best_step: int = 0
    """When the lowest of them was measured."""

    @property
    def evaluations_since_best(self) -> int:
        """How many in a row have brought nothing."""
        return len(self.eval_losses) - 1 - self.eval_losses.index(min(self.eval_losses))


class Trainer:
    """One training, from its beginning or its latest checkpoint to its end."""

    def __init__(self, job: Job, accelerator: Any) -> None:
        self.accelerator, self.settings = accelerator, job.settings
        self._rank, self._ranks = accelerator.process_index, accelerator.num_processes
        self._train, self._evaluation, self._seed = job.train, job.evaluation, job.seed
        self._lengths, self._supervised = job.train.lengths(), job.train.supervised()
        settings = job.settings
        self._order = Order(
            self._lengths,
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
        self._model, self._optimizer = accelerator.prepare(job.model, optimizer)
        self._weights = [weight for weight in self._model.parameters() if weight.requires_grad]
        torch.manual_seed(job.seed + self._rank)

        self._checkpoints = Checkpoints(job.scratch / "checkpoints", accelerator)
        self._metrics_path = job.scratch / METRICS_FILE
        self.progress = Progress()
        self._window_nats = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._note = ""

    def run(self) -> Progress:
        """Train to the end. Raises WorkInterrupted, after a checkpoint, when asked to stop."""
        self._restore()
        resumed = self.progress.step or None
        self._since = time.monotonic() - self.progress.elapsed_s
        with (
            contextlib.closing(MetricsLog(self._metrics_path, resumed))
            if self.accelerator.is_main_process
            else contextlib.nullcontext() as self._metrics,
            stop_on_signals() as stop,
            progress_bar("training", self.total_steps) as bar,
        ):
            bar.advance(self.progress.step)
            if not resumed:
                self._evaluate()
            while self.progress.step < self.total_steps and not self._has_stalled:
                gradient_norm = self.advance()
                self._report(gradient_norm, bar)
                if self._due(self.settings.eval_steps):
                    self._evaluate()
                self._save(stop)
        progress = self.progress
        if progress.step < self.total_steps and self.accelerator.is_main_process:
            log(f"stopping early: the lowest held-out loss was at step {progress.best_step}")
        if self.settings.load_best_model_at_end:
            self._checkpoints.load_best(self._trained)
        return progress

    def advance(self) -> torch.Tensor:
        """One optimizer step over the rows that are next; returns the norm of the gradient."""
        return self._step(self.next_rows)

    @property
    def next_rows(self) -> Rows:
        """The rows of all ranks that the next step sees."""
        return self._order.rows(self.progress.step)

    def take_window(self) -> tuple[float, float]:
        """Nats per learnt token, and learnt tokens per second, since the last call."""
        started, progress = time.monotonic(), self.progress
        nats: float = self.accelerator.reduce(self._window_nats).item()
        # A GPU may still have been at work on the last steps.
        waited_s = time.monotonic() - started
        progress.train_s += waited_s
        tokens, seconds = progress.window_tokens, progress.window_s + waited_s
        self._window_nats.zero_()
        progress.window_tokens, progress.window_s = 0, 0.0
        return nats / tokens, tokens / seconds

    def _step(self, rows: Rows) -> torch.Tensor:
        """One optimizer step over the rows of all ranks; returns the norm of the gradient."""
        started = time.monotonic()
        self._model.train()
        supervised = int(self._supervised[rows].sum())
        settings = self.settings
        groups = passes(rows, self._lengths, settings.per_device_train_batch_size, self._ranks)
        for at, shares in enumerate(groups):
            is_last = at == len(groups) - 1
            # Gradients are averaged over ranks, once, in the last pass.
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self._model):
                nats = self._summed_loss(self._train.rows, shares[self._rank])
                self._scaler.scale(nats * (self._ranks / supervised)).backward()
            self._window_nats += nats.detach()
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._weights, settings.max_grad_norm or math.inf)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        self._optimizer.zero_grad()
        seconds = time.monotonic() - started
        progress = self.progress
        progress.step += 1
        progress.train_s += seconds
        progress.window_s += seconds
        progress.window_tokens += supervised
        progress.supervised_tokens += supervised
        return norm

    def _summed_loss(self, examples: Sequence[Example], rows: Rows) -> torch.Tensor:
        """Loss in nats over some rows; a rank without rows takes part with a loss of nothing."""
        batch = collate([examples[row] for row in rows] or [examples[0]])
        batch = batch.to(self.accelerator.device)
        nats: torch.Tensor = self._model(batch.input_ids_BS, batch.positions_N, batch.targets_N)
        return nats if len(rows) else nats * 0.0

    def _report(self, gradient_norm: torch.Tensor, bar: Bar) -> None:
        """Write a line of metrics every few steps, and stop a training that has gone wrong."""
        progress = self.progress
        if self._due(self.settings.logging_steps):
            progress.final_loss, tokens_per_s = self.take_window()
            if not math.isfinite(progress.final_loss):
                raise TunesmithError(
                    f"the loss is {progress.final_loss} at step {progress.step}; lower "
                    "train.learning_rate, or lengthen train.warmup_steps"
                )
            self._write(
                step=progress.step,
                loss=progress.final_loss,
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
        examples, settings = self._evaluation, self.settings
        rows = choose_rows(len(examples.rows), settings.max_eval_rows, self._seed)
        groups = passes(rows, examples.lengths(), settings.per_device_eval_batch_size, self._ranks)
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for shares in groups:
            total += self._summed_loss(examples.rows, shares[self._rank])
        loss = self.accelerator.reduce(total).item() / int(examples.supervised()[rows].sum())
        self.progress.eval_losses.append(loss)
        if self.progress.evaluations_since_best == 0:
            self.progress.best_step = self.progress.step
            if self.settings.load_best_model_at_end:
                self._checkpoints.save_best(self._trained)
        self._write(step=self.progress.step, eval_loss=loss)
        if self.accelerator.is_main_process:
            log(f"step {self.progress.step}/{self.total_steps}: held-out loss {loss:.4f}")

    def _save(self, stop: Stop) -> None:
        """Write a checkpoint when one is due or somebody on any rank asked to stop."""
        stopping = self._any_rank(stop.requested)
        if not stopping and not self._due(self.settings.save_steps):
            return
        progress = self.progress
        progress.window_nats = self.accelerator.reduce(self._window_nats).item()
        progress.elapsed_s = time.monotonic() - self._since
        self._checkpoints.save(progress.step, self._trained, self._parts, asdict(progress))
        if stopping:
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
            self._window_nats.fill_(self.progress.window_nats)
            log(f"resuming after step {self.progress.step} of {self.total_steps}")

    @property
    def _has_stalled(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _any_rank(self, wish: bool) -> bool:
        if self._ranks == 1:
            return wish
        wishes = torch.tensor(int(wish), device=self.accelerator.device)
        return bool(self.accelerator.reduce(wishes).item())

    def _due(self, interval: float) -> bool:
        step = self.progress.step
        return step % every(interval, self.total_steps) == 0 or step == self.total_steps

    def _write(self, **figures: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(**figures)

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
