"""`tunesmith eval`: every model of the recipe on the same held-out rows, compared in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.config import UserError
from tunesmith.config.schema.evaluate import Evaluate
from tunesmith.evaluate.variants import measure_variant, read_rows, refused
from tunesmith.ledger import Artifact
from tunesmith.pipeline import Stages
from tunesmith.statistics import compare, level
from tunesmith.terminal import make_table

_TITLES = {"completion_loss": "loss (nats/token)", "chrf": "chrF", "rouge_l": "ROUGE-L"}


def run(stages: Stages, names: Sequence[str] = ()) -> dict[str, Any]:
    """Measure what is not measured yet; levels, paired comparisons, and what cannot run here.

    `names` are the models, those of `evaluate.variants` when there are none.
    """
    section = stages.recipe.evaluate
    if section is None:
        raise UserError(f"{stages.path}: this needs an evaluate section")
    artifacts: dict[str, Artifact] = {}
    reused, refusals = [], {}
    for name in names or stages.evaluated:
        if found := stages.store.find(stages.evaluation(name).id):
            artifacts[name] = found
            reused.append(name)
        elif reason := refused(stages, name):
            refusals[name] = reason
        else:
            artifacts[name] = measure_variant(stages, name)
    return result_of(section, stages.recipe.seed, artifacts) | {
        "reused": reused,
        "refused": refusals,
    }


def result_of(section: Evaluate, seed: int, artifacts: dict[str, Artifact]) -> dict[str, Any]:
    """Levels and comparisons of finished evaluations.

    The tuned model is compared with its base, every other one with the tuned model (with the base
    where there is none).
    """
    rows = {name: read_rows(artifact) for name, artifact in artifacts.items()}
    variants, comparisons = {}, []
    for name, artifact in artifacts.items():
        levels = {task: level(rows[name], task, section.confidence, seed) for task in section.tasks}
        variants[name] = {
            "id": artifact.id,
            **artifact.manifest.metrics,
            "levels": {task: found._asdict() for task, found in levels.items() if found},
        }
        other = "tuned" if "tuned" in rows and name != "tuned" else "base"
        if name == "base" or other not in rows:
            continue
        for task in section.tasks:
            if found := compare(rows[name], rows[other], task, section.confidence, seed):
                comparisons.append({"variant": name, "against": other, **found.as_dict()})
    return {"variants": variants, "comparisons": comparisons, "confidence": section.confidence}


def show(result: dict[str, Any]) -> Any:
    """One line per model and metric: the level, and the paired change with its interval."""
    by_pair = {(found["variant"], found["metric"]): found for found in result["comparisons"]}
    rows: list[tuple[str, ...]] = []
    for name, variant in result["variants"].items():
        for task, found in variant["levels"].items():
            level_text = f"{found['value']:.4g} [{found['low']:.4g}, {found['high']:.4g}]"
            change = _change(by_pair.get((name, task)))
            rows.append((name, _TITLES[task], str(variant["rows"]), level_text, *change))
    for name, reason in result["refused"].items():
        rows.append((name, "not on this machine", "", "", "", reason))
    percent = f"{result['confidence']:.0%}"
    columns = ("model", "metric", "rows", f"level [{percent}]", "against", f"change [{percent}]")
    return make_table("Quality on held-out rows", columns, rows)


def _change(found: dict[str, Any] | None) -> tuple[str, str]:
    """Against which model, and how far from it."""
    if found is None:
        return "", ""
    relative = found["relative_percent"]
    interval, unit = (relative, " %") if relative else (found["difference"], "")
    text = f"{interval['value']:+.2f}{unit} [{interval['low']:+.2f}, {interval['high']:+.2f}]"
    return found["against"], text if found["excludes_zero"] else f"{text} no difference shown"
