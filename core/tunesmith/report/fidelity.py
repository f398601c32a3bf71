"""What the verification of compressed checkpoints came to, as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.report import figures as say
from tunesmith.statistics import Interval
from tunesmith.terminal import make_table

Found = Mapping[str, Any]
"""One checkpoint: `id`, `state`, `reasons` and the `metrics` of its fidelity, if it has any."""


@dataclass(frozen=True)
class Line:
    """One checkpoint against its parent, every cell as text; `–` where there is none."""

    name: str
    verdict: str
    loss: str = say.NOTHING
    loss_bounds: str = ""
    kl: str = say.NOTHING
    kl_bounds: str = ""
    flipped: str = say.NOTHING
    flipped_bounds: str = ""
    answers: str = say.NOTHING
    answers_bounds: str = ""
    chrf: str = say.NOTHING
    chrf_bounds: str = ""
    alone: str = say.NOTHING
    alone_bounds: str = ""
    full: str = say.NOTHING
    full_bounds: str = ""
    loaded: str = say.NOTHING
    peak: str = say.NOTHING
    load: str = say.NOTHING
    kernel: str = say.NOTHING
    reasons: tuple[str, ...] = ()


def line(name: str, found: Found) -> Line:
    """The figures of one checkpoint."""
    state, reasons = found["state"], tuple(found["reasons"])
    metrics = found["metrics"]
    if not metrics or not metrics["loads"]:
        return Line(name, state, reasons=reasons)
    total, speed, engine = metrics["total"], metrics["speed"], metrics["engine"]
    loss, kl = Interval(**total["loss_increase"]), Interval(**total["kl"])
    flipped, answers = Interval(**total["flipped"]), Interval(**total["flipped_answers"])
    chrf = Interval(**total["chrf_change"]) if total.get("chrf_change") else None
    alone, full = (Interval(**speed[key]["change"]) for key in ("batch_1", "saturation"))
    digits = 4 if kl.value >= 0.001 else 5
    return Line(
        name=name,
        verdict=state,
        loss=say.percent(loss.value, 2),
        loss_bounds=say.percent_bounds(loss, 2),
        kl=f"{kl.value:.{digits}f}",
        kl_bounds=say.bounds(kl, digits),
        flipped=f"{100 * flipped.value:.1f} %",
        flipped_bounds=f"{say.bounds(_percent(flipped), 1)} %",
        answers=f"{100 * answers.value:.0f} %",
        answers_bounds=f"{say.bounds(_percent(answers), 0)} %",
        chrf=f"{chrf.value:+.2f}".replace("-", "−") if chrf else say.NOTHING,
        chrf_bounds=f"{chrf.low:+.2f} to {chrf.high:+.2f}".replace("-", "−") if chrf else "",
        alone=_times(alone),
        alone_bounds=_times_bounds(alone),
        full=_times(full),
        full_bounds=_times_bounds(full),
        loaded=say.size(engine["loaded_bytes"]),
        peak=say.size(engine["peak_bytes"]),
        load=say.duration(engine["load_s"]),
        kernel=", ".join(engine["kernels"]) or say.NOTHING,
        reasons=reasons,
    )


def fidelity_table(found: Mapping[str, Found]) -> Any:
    """The table that ends `tunesmith quantize`."""
    lines = [line(name, entry) for name, entry in found.items()]
    columns = (
        *("checkpoint", "verdict", "loss", "KL nats/token", "flipped tokens", "answers", "chrF"),
        *("tok/s alone", "tok/s full", "kernel"),
    )
    rows = [
        (
            one.name,
            one.verdict,
            _cell(one.loss, one.loss_bounds),
            _cell(one.kl, one.kl_bounds),
            one.flipped,
            one.answers,
            one.chrf,
            one.alone,
            one.full,
            one.kernel,
        )
        for one in lines
    ]
    return make_table("Against the parent, row by row", columns, rows)


def _cell(value: str, bounds: str) -> str:
    return f"{value}\n[{bounds}]" if bounds else value


def _percent(interval: Interval) -> Interval:
    return Interval(*(100 * bound for bound in interval))


def _times(change: Interval) -> str:
    """`1.32×`: the child's rate over the parent's."""
    return f"{1 + change.value:.2f}×"


def _times_bounds(change: Interval) -> str:
    return f"{1 + change.low:.2f} – {1 + change.high:.2f}"
