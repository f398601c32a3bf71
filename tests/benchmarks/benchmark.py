"""What the measurements of batches share: where figures come from, and how they end."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from provenance import commit, machine


def describe(parser: argparse.ArgumentParser, found: dict[str, Any]) -> dict[str, Any]:
    """The figures with the command, the commit and the machine that they are of."""
    return {
        "command": " ".join(
            ["python", "tests/benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]
        ),
        "what": parser.description,
        "commit": commit(),
        "machine": machine(),
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
