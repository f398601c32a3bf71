"""`tunesmith quantize`: one compressed checkpoint per scheme of the recipe."""

from __future__ import annotations

from typing import Any

from rich.console import Group

from tunesmith.config import UserError
from tunesmith.config.schemes import has_amx, refusal
from tunesmith.ledger import Artifact, gpu_capability
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import allow, summary_of
from tunesmith.quantize.calibration import calibration_of
from tunesmith.quantize.checkpoint import copy_companions, verify, weight_bytes
from tunesmith.quantize.compress import compress
from tunesmith.quantize.modules import Selection
from tunesmith.quantize.profile import layer_errors
from tunesmith.quantize.schemes import DEVICES, Method
from tunesmith.quantize.verification import keep_calibration, verify_in_engine
from tunesmith.terminal import log, make_table


def run(stages: Stages) -> dict[str, Any]:
    """Make every checkpoint that is not there yet, and have each compared with its parent.

    Raises GateError, with all of them kept, when one is refused.
    """
    if not stages.schemes:
        raise UserError(f"{stages.path}: this needs a quantize section")
    checkpoints = {}
    for name in stages.schemes:
        found = stages.store.find(stages.quantized(name).id)
        artifact = found or _make(stages, name)
        checkpoints[name] = {
            "id": artifact.id,
            "folder": str(artifact.root),
            "reused": found is not None,
            **artifact.manifest.metrics,
        }
    allow(stages, verify_in_engine(stages))
    return {"checkpoints": checkpoints, "fidelity": summary_of(stages)}


def show(result: dict[str, Any]) -> Any:
    """One line per checkpoint."""
    from tunesmith.report.fidelity import fidelity_table

    rows = []
    for name, made in result["checkpoints"].items():
        refused = [DEVICES[device] for device, reason in made["devices"].items() if reason]
        rows.append(
            (
                name,
                f"{made['bytes'] / 1e6:,.2f} MB",
                f"{made['bytes'] / made['parent_bytes']:.0%}",
                f"{len(made['quantized'])} / {len(made['kept'])}",
                f"{made['calibration']['tokens']:,}" if made["calibration"] else "none needed",
                "reused" if made["reused"] else f"{made['seconds']:.1f} s",
                f"all but {', '.join(refused)}" if refused else "all",
                made["id"],
            )
        )
    columns = ("scheme", "size", "of parent", "quantized / kept", "calibration tokens", "time")
    table = make_table("Quantized checkpoints", (*columns, "vLLM devices", "artifact"), rows)
    return Group(table, fidelity_table(result["fidelity"]))


def _make(stages: Stages, name: str) -> Artifact:
    recipe = stages.recipe
    assert recipe.quantize
    method = Method.of(recipe.quantize, name)
    parent = stages.made(stages.tuned if recipe.train else stages.base)
    calibration = None
    if method.calibrated:
        calibration = calibration_of(recipe, stages.made(stages.dataset), parent.root)
    draft = stages.quantized(method.name)
    reason = refusal(method.scheme.devices(), gpu_capability(), has_amx=has_amx())
    if reason and recipe.quantize.device is None:
        log(f"{name} will not run in vLLM on this machine: {reason}")
    log(f"{method.name}: quantizing {parent.id}")
    with stages.store.write(draft, recipe) as work:
        done = compress(
            parent.root,
            work.out,
            method,
            calibration,
            dtype=recipe.model.dtype,
            trust_remote_code=recipe.model.trust_remote_code,
            scratch=work.scratch,
        )
        copy_companions(parent.root, work.out, recipe.model.chat_template)
        verify(work.out, done.selection)
        if calibration:
            keep_calibration(stages, method.name, calibration)
        work.metrics |= {
            "scheme": method.name,
            "algorithm": method.algorithm,
            "changes_activations": method.changes_activations,
            "bytes": weight_bytes(work.out),
            "parent_bytes": weight_bytes(parent.root),
            "calibration": calibration.counts() if calibration else None,
            "seconds": done.seconds,
            "whole": done.whole,
            "warnings": done.warnings,
            "devices": method.scheme.devices(),
            "layers": layer_errors(parent.root, work.out, done.selection.quantized),
            **_modules(done.selection),
        }
    return stages.made(draft)


def _modules(selection: Selection) -> dict[str, Any]:
    return {
        "group_size": selection.group_size,
        "quantized": sorted(selection.quantized),
        "kept": selection.kept,
    }
