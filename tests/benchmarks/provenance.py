"""Where a measured figure comes from; every report has it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from tunesmith.ledger import describe_environment


def commit() -> str:
    """The commit of this checkout, with `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
    return found.stdout.decode().strip()


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    found = describe_environment()
    return {key: found[key] for key in ("cpu", "cpu_count", "memory_gib", "versions")}
