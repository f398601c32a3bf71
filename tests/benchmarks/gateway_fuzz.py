"""Thousands of odd requests to the gateway, made by schemathesis from its own OpenAPI document.

python tests/benchmarks/gateway_fuzz.py --out docs/measured/gateway-fuzz.json

schemathesis is installed into an environment of its own, as it is no dependency of the project.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmark import describe, finish
from mocked import Mocked, mocked

from tunesmith.config.schema.serve import Serve
from tunesmith.serve.govern.archive import read_log
from tunesmith.serve.govern.database import open_gateway

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
LONGEST_S = 5.0


def main() -> None:
    """Fuzz, look at what the gateway made of it, and end with 3 when it did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=5_000, help="at least so many")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--python", type=Path, help="an interpreter that has schemathesis")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        program = _schemathesis(scratch, options.python)
        rounds: list[dict[str, Any]] = []
        with mocked(scratch / "store", Serve(), upstream_s=0.0) as place:
            while sum(one["cases"] for one in rounds) < options.cases:
                rounds.append(_fuzz(program, place, scratch, options.seed + len(rounds)))
            figures = _figures(place, rounds)
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    figures["schemathesis"] = version.stdout.split()[-1]
    finish(options.out, describe(parser, figures), _faults(figures))


def _schemathesis(scratch: Path, python: Path | None) -> Path:
    """Its program."""
    if python is None:
        python = scratch / "environment" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", scratch / "environment"], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "schemathesis==4.32.5"], check=True
        )
    return python.parent / "schemathesis"


def _fuzz(program: Path, place: Mocked, scratch: Path, seed: int) -> dict[str, Any]:
    """One run over every operation."""
    report = scratch / f"{seed}.ndjson"
    started_s = time.monotonic()
    done = subprocess.run(
        [
            program, "run", f"{place.url}/openapi.json", "--checks", ",".join(CHECKS),
            "--max-examples", "500", "--seed", str(seed), "--request-timeout", str(LONGEST_S),
            "--max-response-time", str(LONGEST_S), "--no-shrink", "--continue-on-failure",
            "--suppress-health-check", "all", "--report", "ndjson", "--report-ndjson-path", report,
        ],
        capture_output=True, text=True, cwd=scratch,
    )  # fmt: skip
    statuses = Counter(_statuses(report))
    return {
        "seed": seed,
        "cases": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "exit_code": done.returncode,
        "said": done.stdout[-6_000:] if done.returncode else "",
        "seconds": round(time.monotonic() - started_s, 1),
    }


def _statuses(report: Path) -> list[str]:
    """Of every case's answer; `none` where there was no answer."""
    found = []
    for line in report.read_text(encoding="utf-8").splitlines():
        scenario = json.loads(line).get("ScenarioFinished")
        for one in (scenario or {}).get("recorder", {}).get("interactions", {}).values():
            response = one.get("response")
            found.append(str(response["status_code"]) if response else "none")
    return found


def _figures(place: Mocked, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    time.sleep(1)  # the log is written a few times a second
    database = open_gateway(place.store)
    log = read_log(database, place.store / "serve", ["status", "ending"]).to_pylist()
    statuses = Counter(line["status"] for line in log)
    return {
        "cases": sum(one["cases"] for one in rounds),
        "logged": {str(status): count for status, count in sorted(statuses.items())},
        "gateway_mib": round(place.rss_mib, 1),
        "rounds": rounds,
    }


def _faults(figures: dict[str, Any]) -> list[str]:
    faults = [
        f"seed {one['seed']}: schemathesis ended with {one['exit_code']}"
        for one in figures["rounds"]
        if one["exit_code"]
    ]
    for one in figures["rounds"]:
        bad = {s: n for s, n in one["statuses"].items() if s == "none" or s >= "500"}
        faults += [
            f"seed {one['seed']}: {count} answers of {status}" for status, count in bad.items()
        ]
    faults += [f"{n} lines of {s} in the log" for s, n in figures["logged"].items() if s >= "500"]
    return faults


if __name__ == "__main__":
    main()
