"""`tunesmith quantize`: one compressed checkpoint per scheme of the recipe."""

from __future__ import annotations

from typing import Any

from rich.console import Group

from tunesmith.config import UserError
from tunesmith.config.schema.quantize import AUTO
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import allow, summary_of
from tunesmith.quantize.making import make
from tunesmith.quantize.schemes import DEVICES
from tunesmith.quantize.search import search
from tunesmith.quantize.verification import verify_in_engine
from tunesmith.terminal import make_table


def run(stages: Stages) -> dict[str, Any]:
    """Make every checkpoint that is not there yet, and have each compared with its parent.

    Raises GateError, with all of them kept, when one is refused.
    """
    if not stages.schemes:
        raise UserError(f"{stages.path}: this needs a quantize section")
    checkpoints = {}
    for name in stages.schemes:
        found = stages.store.find(stages.quantized(name).id)
        artifact = found or (search(stages) if name == AUTO else make(stages, name))
        checkpoints[name] = {
            "id": artifact.id,
            "folder": str(artifact.root),
            "reused": found is not None,
            **artifact.manifest.metrics,
        }
    verdicts = verify_in_engine(stages)
    # What will be recovered is judged here for the record alone.
    recovered = stages.recipe.quantize.recovered if stages.recipe.quantize else ()
    allow(stages, {name: found for name, found in verdicts.items() if name not in recovered})
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
    searches = [_search_table(made) for made in result["checkpoints"].values() if "search" in made]
    return Group(table, *searches, fidelity_table(result["fidelity"]))


def _search_table(made: dict[str, Any]) -> Any:
    """What `auto` tried, in the order in which it did."""
    rows = [
        (
            one["name"],
            f"{one['bytes'] / 1e6:,.2f} MB",
            "" if one["loss_increase"] is None else f"{one['loss_increase']:+.2%}",
            "" if one["tokens_per_s"] is None else f"{one['tokens_per_s']:,.0f}",
            one["state"],
            "chosen" if one["id"] == made["chosen_id"] else "",
            "yes" if one["name"] in made["pareto"] else "",
        )
        for one in made["search"]
    ]
    rows += [(name, "", "", "", reason, "", "") for name, reason in made["not_here"].items()]
    columns = ("tried", "size", "loss", "tokens/s", "verdict", "", "not beaten")
    return make_table(f"auto: {made['reason']}", columns, rows)
