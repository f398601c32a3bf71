"""One checkpoint, from its parent to an artifact."""

from __future__ import annotations

from typing import Any

from tunesmith.config.schemes import has_amx, refusal
from tunesmith.ledger import Artifact, gpu_capability
from tunesmith.pipeline import Stages
from tunesmith.quantize.calibration import calibration_of
from tunesmith.quantize.checkpoint import copy_companions, verify, weight_bytes
from tunesmith.quantize.compress import compress
from tunesmith.quantize.modules import Selection
from tunesmith.quantize.profile import layer_errors
from tunesmith.quantize.schemes import Method
from tunesmith.quantize.verification import keep_calibration
from tunesmith.terminal import log


def make(stages: Stages, name: str) -> Artifact:
    recipe = stages.recipe
    assert recipe.quantize
    method = Method.of(recipe.quantize, name)
    parent = stages.made(stages.unquantized)
    calibration = None
    if method.calibrated:
        calibration = calibration_of(recipe, stages.made(stages.dataset), parent.root)
    draft = stages.quantized(method.name)
    if recipe.quantize.device is None and (reason := refused_here(method)):
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


def refused_here(method: Method) -> str | None:
    """Why vLLM cannot run it on this machine; None when it can."""
    return refusal(method.scheme.devices(), gpu_capability(), has_amx=has_amx())


def _modules(selection: Selection) -> dict[str, Any]:
    return {
        "group_size": selection.group_size,
        "quantized": sorted(selection.quantized),
        "kept": selection.kept,
    }
