"""`tunesmith eval --fidelity`: every compressed checkpoint of the recipe against its parent."""

from __future__ import annotations

from typing import Any

from tunesmith.config import UserError
from tunesmith.evaluate.fidelity.measure import measure_fidelity, opened_parent
from tunesmith.evaluate.variants import refused
from tunesmith.ledger import Work
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import allow, judge, summary_of, verdict_of
from tunesmith.terminal import log


def run(stages: Stages) -> dict[str, Any]:
    """Measure what is not measured yet, and judge all; raises GateError when one is refused.

    A checkpoint that this machine's engine has no kernel for stays unverified, with the reason.
    """
    if not stages.schemes:
        raise UserError(f"{stages.path}: this needs a quantize section")
    if not stages.fidelities:
        raise UserError(f"{stages.path}: quantize.verify_rows is 0, which verifies nothing")
    missing, elsewhere = [], {}
    for scheme in stages.schemes:
        stages.made(stages.quantized(scheme))
        if stages.store.find(stages.fidelity(scheme).id):
            continue
        if reason := refused(stages, scheme):
            elsewhere[scheme] = reason
            log(f"{scheme}: not verified on this machine: {reason}")
        else:
            missing.append(scheme)
    if missing:
        with opened_parent(stages) as parent:
            for scheme in missing:
                with stages.store.write(stages.fidelity(scheme), stages.recipe) as work:
                    measure_fidelity(stages, scheme, parent, work)
                    _record_verdict(stages, scheme, work)
    allow(stages, {scheme: verdict_of(stages, scheme) for scheme in stages.schemes})
    return {"fidelity": summary_of(stages), "not_here": elsewhere}


def show(result: dict[str, Any]) -> Any:
    """One line per checkpoint."""
    from tunesmith.report.fidelity import fidelity_table

    return fidelity_table(result["fidelity"])


def _record_verdict(stages: Stages, scheme: str, work: Work) -> None:
    """As the limits are now; another limit is judged anew wherever the checkpoint is used."""
    limits = stages.recipe.quantize
    assert limits
    checkpoint = stages.made(stages.quantized(scheme)).manifest.metrics
    verdict = judge(checkpoint, work.metrics, limits)
    work.metrics["verdict"] = {
        "state": verdict.state,
        "reasons": list(verdict.reasons),
        "limits": limits.model_dump(include={"max_loss_increase", "max_kl", "max_flipped"}),
    }
    log(f"{scheme}: {verdict.state}")
