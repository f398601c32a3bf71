"""`tunesmith batch`: a file of prompts in, a file of answers out."""

from __future__ import annotations

import shutil
from typing import Any

from tunesmith.batch.cluster import Share, connect
from tunesmith.batch.drift import SHARDS, check_drift, note_output
from tunesmith.batch.generate import Job, generate
from tunesmith.batch.models import batch_origin, batch_spec
from tunesmith.batch.output import ERRORS, OUTPUT, write_output
from tunesmith.batch.publish import check_output, publish
from tunesmith.batch.rows import read_rows
from tunesmith.batch.shards import Shards
from tunesmith.config import DataError, GateError, UserError
from tunesmith.config.schema.batch import Batch
from tunesmith.engine import Place, find_places
from tunesmith.ledger import Artifact, gpu_names
from tunesmith.pipeline import Stages
from tunesmith.pipeline.batch import digest_batch
from tunesmith.pipeline.verdict import require_approval
from tunesmith.terminal import log, make_table


def run(stages: Stages, *, discard: bool = False) -> dict[str, Any]:
    """Answer what has no answer yet and write the output file.

    Raises UserError when a batch that was interrupted would be left behind, unless `discard`, and
    GateError, with everything written, when more rows failed than `batch.max_error_rate` allows.
    """
    section = stages.recipe.batch
    if section is None:
        raise UserError(f"{stages.path}: this needs a batch section")
    draft = stages.batch()
    check_output(section)
    check_drift(stages, section, discard=discard)
    found = stages.store.find(draft.id)
    artifact = found or _make(stages, section)
    entry = artifact.manifest.files[OUTPUT]
    if publish(artifact.root / OUTPUT, entry.sha256, section):
        log(f"batch: wrote {section.output}")
    metrics = artifact.manifest.metrics
    failed = sum(metrics["errors"].values())
    if failed > section.max_error_rate * metrics["rows"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in metrics["errors"].items())
        raise GateError(
            f"{failed} of {metrics['rows']} rows have no answer ({kinds}), more than "
            f"batch.max_error_rate {section.max_error_rate:g} allows; the other answers are in "
            f"{section.output}, the reasons in {artifact.root / ERRORS}"
        )
    return {
        "id": artifact.id,
        "reused": found is not None,
        "output": section.output,
        "errors_file": str(artifact.root / ERRORS),
        **metrics,
    }


def show(result: dict[str, Any]) -> Any:
    """What was answered, how fast, and at what price."""
    price = result["usd_per_million_output_tokens"]
    speed = result["tokens_per_s"]
    rows = [
        ("rows", f"{result['rows']:,}"),
        ("answered", f"{result['answered']:,}"),
        *((f"error: {kind}", f"{count:,}") for kind, count in result["errors"].items()),
        ("prompt tokens", f"{result['prompt_tokens']:,}"),
        ("output tokens", f"{result['output_tokens']:,}"),
        ("rows equal to earlier ones", f"{result['deduplicated_rows']:,}"),
        ("rows done again after a stop", f"{result['rework_rows']:,}"),
        ("engines started again", f"{result['restarts']:,}"),
        ("seconds of generation", f"{result['generation_s']:,.1f}"),
        ("output tokens/s", "-" if speed is None else f"{speed:,.0f}"),
        ("USD", "-" if result["usd"] is None else f"{result['usd']:,.4f}"),
        ("USD per million output tokens", "-" if price is None else f"{price:,.4f}"),
        ("output", result["output"]),
        ("artifact", result["id"] + (" (made already)" if result["reused"] else "")),
    ]
    return make_table("Batch", ("", result["variant"]), rows)


def _make(stages: Stages, section: Batch) -> Artifact:
    """Read all rows once to check them, answer those that can be, and write the artifact."""
    draft = stages.batch()
    variant, _ = stages.variant(section.model)
    require_approval(stages, variant)
    spec = batch_spec(stages, section)
    total = valid = 0
    for row in read_rows(section):
        total += 1
        valid += row.error is None
    if not total:
        raise DataError(f"batch.input: {section.input} has no rows")
    places, devices = _places(stages, section)
    usd_per_s = _usd_per_s(stages, devices)
    with stages.store.write(draft, stages.recipe) as work:
        note_output(work.scratch, section)
        shards = Shards(work.scratch / SHARDS, total, {"id": draft.id})
        load_s = 0.0
        if shards.count < valid:
            load_s = generate(Job(section, spec, places, valid, usd_per_s), shards)
        totals = write_output(section, shards, work.out, batch_origin(stages, section, usd_per_s))
        if digest_batch(stages.store, section) != draft.inputs["input"]:
            raise DataError(
                f"batch.input: {section.input} changed while it was read; leave it as it is and "
                "run the same command again"
            )
        if shards.restarts:  # the errors of rows name these files, and the scratch folder goes
            for path in work.scratch.glob("engine-*.log"):
                shutil.copyfile(path, work.out / path.name)
        seconds, tokens = shards.seconds, totals.output_tokens
        work.metrics |= {
            "variant": variant,
            "rows": totals.rows,
            "answered": totals.rows - totals.errors.total(),
            "errors": dict(totals.errors.most_common()),
            "prompt_tokens": totals.prompt_tokens,
            "cached_tokens": totals.cached_tokens,
            "output_tokens": tokens,
            "load_s": round(load_s, 3),
            "generation_s": round(seconds, 3),
            "usd": None if usd_per_s is None else usd_per_s * seconds,
            "replicas": len(places),
            "restarts": shards.restarts,
            "rework_rows": max(0, shards.handed - shards.computed),
            "deduplicated_rows": shards.repeated,
            "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
            "usd_per_million_output_tokens": (
                usd_per_s * seconds / tokens * 1e6 if usd_per_s is not None and tokens else None
            ),
        }
    return stages.made(draft)


def _places(stages: Stages, section: Batch) -> tuple[list[Place] | Share, int]:
    """Where the engines go, and how many devices are paid for meanwhile."""
    each = stages.recipe.engine.tensor_parallel_size
    if section.cluster == "ray":
        share = connect(section.cluster_address, section.replicas, each)
        return share, share.devices
    places = find_places(section.replicas, each)
    return places, len(places) * each if gpu_names() else 1


def _usd_per_s(stages: Stages, devices: int) -> float | None:
    """Price of the devices that the engines hold."""
    price = stages.recipe.price
    return None if price is None else price.gpu_hour_usd / 3600 * devices
