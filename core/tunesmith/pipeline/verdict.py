"""Whether a compressed checkpoint may be used: pure functions over what was measured of it.

A checkpoint inherits nothing from its parent. It is approved when the upper bound of every gated
figure's interval is within its limit: what few rows leave open counts against it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.config import GateError
from tunesmith.config.schema.quantize import Quantize
from tunesmith.ledger import Store
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import log

_OUTLIER = 4.0  # times the median layer
_OFF, _ROW_OFF = 0.5, 1.0  # relative errors; at 1 a row of zeros would be as good
_NAMED = 3


@dataclass(frozen=True)
class Verdict:
    """What the verification of one checkpoint came to."""

    state: Literal["approved", "refused", "unverified"]
    reasons: tuple[str, ...] = ()
    """Why it was refused."""


def judge(
    checkpoint: Mapping[str, Any], fidelity: Mapping[str, Any] | None, limits: Quantize
) -> Verdict:
    """The verdict over the metrics of a checkpoint and of its fidelity, if that was measured."""
    reasons = [*_layer_faults(checkpoint.get("layers", {}))]
    if fidelity:
        reasons += _engine_faults(fidelity) if fidelity["loads"] else [fidelity["refusal"]]
    if fidelity and fidelity["loads"]:
        reasons += _limit_faults(fidelity, limits) + _calibration_faults(fidelity)
    if reasons and (named := worst_layers(checkpoint.get("layers", {}))):
        reasons.append(f"layers with the largest weight errors: {', '.join(named)}")
    if reasons:
        return Verdict("refused", tuple(reasons))
    return Verdict("approved" if fidelity else "unverified")


def verdict_of(stages: Stages, scheme: str) -> Verdict:
    """The verdict over a scheme's checkpoint under the recipe's limits; unverified when nothing
    has been made."""
    checkpoint = stages.store.find(stages.quantized(scheme).id)
    fidelity = stages.store.find(stages.fidelity(scheme).id)
    limits = stages.recipe.quantize
    if checkpoint is None or limits is None:
        return Verdict("unverified")
    return judge(
        checkpoint.manifest.metrics, fidelity.manifest.metrics if fidelity else None, limits
    )


def summary_of(stages: Stages) -> dict[str, Any]:
    """Verdict and figures of each checkpoint of the recipe, by scheme."""
    found = {}
    for scheme in stages.schemes:
        verdict, draft = verdict_of(stages, scheme), stages.fidelity(scheme)
        artifact = stages.store.find(draft.id)
        found[scheme] = {
            "id": artifact.id if artifact else None,
            "state": verdict.state,
            "reasons": list(verdict.reasons),
            "metrics": artifact.manifest.metrics if artifact else None,
        }
    return found


def recorded_verdict(store: Store, checkpoint_id: str) -> Verdict | None:
    """What was written down when a checkpoint was last measured, by the limits of then."""
    found = [
        artifact.manifest
        for role, child_id in store.index.children(checkpoint_id)
        if role == "checkpoint" and (artifact := store.find(child_id))
    ]
    if not found:
        return None
    verdict = max(found, key=lambda manifest: manifest.created_at).metrics["verdict"]
    return Verdict(verdict["state"], tuple(verdict["reasons"]))


def require_no_refusal(store: Store, checkpoint_id: str, *, allowed: bool) -> None:
    """Stop before a checkpoint leaves that was refused when it was last measured.

    Raises GateError unless `allowed`; then it is only said.
    """
    verdict = recorded_verdict(store, checkpoint_id)
    if verdict is None or verdict.state != "refused":
        return
    text = "\n  ".join([f"{checkpoint_id} is refused:", *verdict.reasons])
    if not allowed:
        raise GateError(f"{text}\nexport it all the same with --allow-refused")
    log(f"{text}\n  exported all the same")


def require_approval(stages: Stages, variant: str) -> None:
    """Stop before a refused checkpoint is used, and say so of one that was not verified.

    Raises GateError unless `quantize.allow_refused` is set.
    """
    if variant not in stages.schemes:
        recorded = recorded_verdict(stages.store, stages.variants[variant].id)
        if recorded and recorded.state == "refused":
            log(f"{variant} was refused as a copy of its parent: {'; '.join(recorded.reasons)}")
        return
    verdict = verdict_of(stages, variant)
    if verdict.state == "unverified":
        log(f"{variant} was not verified against its parent: {how_to_verify(stages)}")
    if verdict.state == "refused":
        allow(stages, {variant: verdict})


def allow(stages: Stages, verdicts: Mapping[str, Verdict]) -> None:
    """Raise GateError for refused checkpoints; only log it where the recipe allows them."""
    refused = {name: found for name, found in verdicts.items() if found.state == "refused"}
    if not refused:
        return
    lines = [
        f"{name} ({stages.quantized(name).id}) is refused:\n"
        + "\n".join(f"  {reason}" for reason in found.reasons)
        for name, found in refused.items()
    ]
    text = "\n".join(lines)
    if stages.recipe.quantize and stages.recipe.quantize.allow_refused:
        log(f"{text}\n  taken all the same: quantize.allow_refused is set")
        return
    raise GateError(
        f"{text}\nthe checkpoint is kept; use another scheme, raise the limit that it breaks, or "
        "take it all the same with quantize.allow_refused=true"
    )


def how_to_verify(stages: Stages) -> str:
    """The command that verifies what this machine could not."""
    return f"where vLLM runs it, run: tunesmith eval {stages.path} --fidelity"


def worst_layers(layers: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The names of the layers that are furthest from their parent's, with how far."""
    ranked = sorted(layers, key=lambda name: -layers[name]["error"])[:_NAMED]
    return [f"{name} ({layers[name]['error']:.1%})" for name in ranked]


def _layer_faults(layers: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Layers that are off by far more than the others: a scale that cannot be right."""
    found: dict[str, str] = {}
    for key, limit, what in (
        ("error", _OFF, "its weights are off by"),
        ("worst_row", _ROW_OFF, "the weights of one output are off by"),
    ):
        usual = statistics.median(entry[key] for entry in layers.values()) if layers else 0.0
        for name, entry in layers.items():
            if entry[key] <= max(limit, _OUTLIER * usual):
                continue
            # AWQ moves scales between layers: then all of a kind are off, and no output is.
            if entry[key] > _OUTLIER * _usual_of_kind(layers, name, key):
                text = f"{name}: {what} {entry[key]:.0%}, those of the middle layer {usual:.1%}"
                found.setdefault(name, text)
    return list(found.values())


def _usual_of_kind(layers: Mapping[str, Mapping[str, float]], name: str, key: str) -> float:
    """The median over the same layer of all other blocks; 0 where there is none."""
    kind = name.rpartition(".")[2]
    others = [
        entry[key]
        for other, entry in layers.items()
        if other != name and other.rpartition(".")[2] == kind
    ]
    return statistics.median(others) if others else 0.0


def _engine_faults(fidelity: Mapping[str, Any]) -> list[str]:
    golden = fidelity["golden"]
    if golden["answered"] or not golden["by_parent"]:
        return []
    return [f"none of {golden['asked']} golden prompts was answered"]


def _limit_faults(fidelity: Mapping[str, Any], limits: Quantize) -> list[str]:
    total = fidelity["total"]
    checks = (
        ("max_loss_increase", "the loss rises by", total["loss_increase"], 100, " %"),
        ("max_kl", "the divergence is", total["kl"], 1, " nats per token"),
        ("max_flipped", "the likeliest token differs at", total["flipped"], 100, " %"),
    )
    found = []
    for key, what, figure, factor, unit in checks:
        limit = getattr(limits, key)
        if limit is None or figure["high"] <= limit:
            continue
        value, low, high = (factor * figure[bound] for bound in ("value", "low", "high"))
        doubt = "" if figure["low"] > limit else "; more quantize.verify_rows may show it is within"
        found.append(
            f"{what} {value:.3g}{unit} [{low:.3g}, {high:.3g}], and quantize.{key} is "
            f"{factor * limit:.3g}{unit}{doubt}"
        )
    return found


def _calibration_faults(fidelity: Mapping[str, Any]) -> list[str]:
    """Text that the parent finds no likelier than tokens drawn by lot is not its language."""
    calibration = fidelity["calibration"]
    if calibration is None:
        return []
    loss, held_out = calibration["loss"], calibration["held_out_loss"]
    chance = math.log(calibration["vocabulary"])
    if loss["low"] < chance or held_out["high"] >= chance:
        return []
    return [
        f"it was calibrated on noise: to its parent that text has {loss['value']:.2f} nats per "
        f"token, tokens drawn by lot have {chance:.2f}, held-out rows {held_out['value']:.2f}"
    ]
