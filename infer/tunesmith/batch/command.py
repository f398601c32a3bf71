"""`tunesmith batch`: a file of prompts in, a file of answers out."""

from __future__ import annotations

from typing import Any

from tunesmith.batch.cluster import Share, connect
from tunesmith.batch.generate import Job, generate
from tunesmith.batch.output import check_output, publish, write_output
from tunesmith.batch.rows import read_rows
from tunesmith.batch.shards import Shards
from tunesmith.config import DataError, GateError, UserError
from tunesmith.config.schema.batch import Batch
from tunesmith.engine import Place, engine_spec, find_places
from tunesmith.ledger import Artifact, gpu_names, hash_file
from tunesmith.pipeline import Stages
from tunesmith.terminal import log, make_table

_OUTPUT = "output.jsonl"
_ERRORS = "errors.jsonl"


def run(stages: Stages) -> dict[str, Any]:
    """Answer what has no answer yet and write the output file.

    Raises GateError, with everything written, when more rows failed than
    `batch.max_error_rate` allows.
    """
    section = stages.recipe.batch
    if section is None:
        raise UserError(f"{stages.path}: this needs a batch section")
    draft = stages.batch()
    check_output(section)
    found = stages.store.find(draft.id)
    artifact = found or _make(stages, section)
    entry = artifact.manifest.files[_OUTPUT]
    if not section.output.exists() or hash_file(section.output) != entry.sha256:
        publish(artifact.root / _OUTPUT, section.output)
        log(f"batch: wrote {section.output}")
    metrics = artifact.manifest.metrics
    failed = sum(metrics["errors"].values())
    if failed > section.max_error_rate * metrics["rows"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in metrics["errors"].items())
        raise GateError(
            f"{failed} of {metrics['rows']} rows have no answer ({kinds}), more than "
            f"batch.max_error_rate {section.max_error_rate:g} allows; the other answers are in "
            f"{section.output}, the reasons in {artifact.root / _ERRORS}"
        )
    return {
        "id": artifact.id,
        "reused": found is not None,
        "output": str(section.output),
        "errors_file": str(artifact.root / _ERRORS),
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
        ("seconds of generation", f"{result['generation_s']:,.1f}"),
        ("output tokens/s", "-" if speed is None else f"{speed:,.0f}"),
        ("USD per million output tokens", "-" if price is None else f"{price:,.4f}"),
        ("output", result["output"]),
        ("artifact", result["id"] + (" (made already)" if result["reused"] else "")),
    ]
    return make_table("Batch", ("", result["variant"]), rows)


def _make(stages: Stages, section: Batch) -> Artifact:
    """Read all rows once to check them, answer those that can be, and write the artifact."""
    draft = stages.batch()
    spec = engine_spec(stages, section.model)
    variant, _ = stages.variant(section.model)
    total = valid = 0
    for row in read_rows(section):
        total += 1
        valid += row.error is None
    if not total:
        raise DataError(f"batch.input: {section.input} has no rows")
    devices = stages.recipe.engine.tensor_parallel_size
    places: list[Place] | Share
    if section.cluster == "ray":
        places = connect(section.cluster_address, section.replicas, devices)
        devices = places.devices
    else:
        places = find_places(section.replicas, devices)
        devices = len(places) * devices if gpu_names() else 1
    usd_per_s = _usd_per_s(stages, devices)
    with stages.store.write(draft, stages.recipe) as work:
        shards = Shards(work.scratch / "shards", total, {"id": draft.id})
        load_s = 0.0
        if shards.count < valid:
            load_s = generate(Job(section, spec, places, valid, usd_per_s), shards)
        totals = write_output(section, shards, work.out)
        if stages.store.digest(section.input) != draft.inputs["input"]:
            raise DataError(
                f"batch.input: {section.input} changed while it was read; leave it as it is and "
                "run the same command again"
            )
        seconds, tokens = shards.seconds, totals.output_tokens
        work.metrics |= {
            "variant": variant,
            "rows": totals.rows,
            "answered": totals.rows - totals.errors.total(),
            "errors": dict(totals.errors.most_common()),
            "prompt_tokens": totals.prompt_tokens,
            "output_tokens": tokens,
            "load_s": round(load_s, 3),
            "generation_s": round(seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
            "usd_per_million_output_tokens": (
                usd_per_s * seconds / tokens * 1e6 if usd_per_s is not None and tokens else None
            ),
        }
    return stages.made(draft)


def _usd_per_s(stages: Stages, devices: int) -> float | None:
    """Price of the devices that the engines hold."""
    price = stages.recipe.price
    return None if price is None else price.gpu_hour_usd / 3600 * devices
