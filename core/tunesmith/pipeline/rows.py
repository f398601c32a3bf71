"""Rows of a dataset artifact, as every later stage reads them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def sample_rows(path: Path, count: int | None, seed: int) -> list[dict[str, Any]]:
    """`count` rows of a JSONL file chosen by the seed, in file order; all when None or fewer."""
    with path.open(encoding="utf-8") as file:
        total = sum(1 for _ in file)
    wanted = total if count is None else min(count, total)
    chosen = frozenset(random.Random(seed).sample(range(total), wanted))
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for at, line in enumerate(file) if at in chosen]
