"""Memory of reading a data set, and what its kept tokens save: tokenising against finding them.

    python tests/benchmarks/data.py --out docs/measured/data-cpu.json

Rows are random words of the standard library's `random.py`, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from provenance import commit, machine

from tunesmith.chat import ChatTemplate
from tunesmith.config.schema import Recipe
from tunesmith.data import make_dataset
from tunesmith.pipeline import Stages
from tunesmith.train.batches import Order
from tunesmith.train.language import Language
from tunesmith.train.tokenizer import learn_tokenizer
from tunesmith.train.tokens import Example, TokenRows, TokenWriter

WORDS = Path(random.__file__).read_text(encoding="utf-8").split()
VOCABULARY = 256_000
_PEAK = """
import sys
from pathlib import Path
from tunesmith.config.schema import Recipe
from tunesmith.data import make_dataset
from tunesmith.pipeline import Stages

def make(path):
    recipe = {"name": "b", "store": {"folder": path + ".store"}, "model": {"base": "x/y"},
              "data": {"train": path}}
    make_dataset(Stages(Recipe.model_validate(recipe)))
    # Not ru_maxrss, in which a process begins with the peak of the one that started it.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

before = make(sys.argv[1])
print(make(sys.argv[2]) - before)
"""


def main() -> None:
    """Measure everything and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seek-rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {
            "command": f"python tests/benchmarks/data.py --rows {given.rows} "
            f"--seek-rows {given.seek_rows} --rounds {given.rounds} --out {given.out}",
            "commit": commit(),
            "machine": machine(),
            "reading": _reading(folder, given.rows * 2),
            "tokens": _tokens(folder, given.rows, given.rounds),
            "seeking": _seeking(folder / "seek", given.seek_rows, given.rounds),
        }
    given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


def _write(path: Path, count: int) -> Path:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for at in range(count):
            asked, answered = (
                " ".join(draw.choices(WORDS, k=draw.randrange(5, most))) for most in (40, 60)
            )
            turns = [("user", f"{at} {asked}"), ("assistant", answered)]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def _reading(folder: Path, rows: int) -> dict[str, Any]:
    """Growth of a process's peak memory over the same work on a few rows."""
    small, large = _write(folder / "small.jsonl", 100), _write(folder / "large.jsonl", rows)
    command = [sys.executable, "-c", _PEAK, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        "rows": rows,
        "file_mib": round(large.stat().st_size / 2**20, 1),
        "peak_growth_mib": round(float(done.stdout), 1),
    }


def _tokens(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Seconds to tokenise, then to find the tokens again with a language read anew."""
    recipe = Recipe.model_validate(
        {
            "name": "b",
            "store": {"folder": folder / "store"},
            "model": {"base": "x/y"},
            "data": {
                "train": str(_write(folder / "rows.jsonl", rows)),
                "max_length": 1024,
                "evaluation_fraction": 0.01,
            },
        }
    )
    assert recipe.data
    dataset = make_dataset(Stages(recipe))
    tokenizer = _large_tokenizer()
    seconds = []
    for _ in range(1 + rounds):
        language = Language(tokenizer, ChatTemplate(tokenizer))
        started = time.perf_counter()
        found = language.tokenise(dataset, "train.jsonl", recipe.data)
        tokens = int(found.lengths().sum())
        seconds.append(round(time.perf_counter() - started, 4))
    miss, *hits = seconds
    return {
        "rows": rows,
        "tokens": tokens,
        "vocabulary": VOCABULARY,
        "made_s": miss,
        "found_s": hits,
        "times_faster": round(miss / sorted(hits)[len(hits) // 2]),
    }


def _large_tokenizer() -> Any:
    """One whose files are as large as those of the largest models: that is what a key hashes."""
    from tokenizers import Tokenizer

    tokenizer = learn_tokenizer(WORDS * 3, 4096, 2048)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    for at in range(len(vocabulary), VOCABULARY):
        vocabulary[f"never written {at}"] = at + 100
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    return tokenizer


def _seeking(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Seconds from nothing to the token ids of one random step."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.pareto(1.5, rows) * 60 + 20, 2048).astype(int)
    ids, learnt = draw.integers(0, 32_000, 2048).astype(np.int32), draw.random(2048) < 0.5
    writer = TokenWriter(folder)
    for length in lengths:
        writer.append(Example(ids[:length], learnt[:length]))
    writer.close()
    seconds: dict[str, list[float]] = {}
    for rows_per_step in (8, 64, 512):
        for _ in range(rounds):
            started = time.perf_counter()
            found = TokenRows(folder)
            order = Order(found.lengths, rows_per_step, 17)
            step = int(draw.integers(3 * order.steps_per_epoch))
            sum(int(found[int(at)].input_ids.sum()) for at in order.groups(step))
            taken = seconds.setdefault(f"{rows_per_step} rows per step", [])
            taken.append(round(time.perf_counter() - started, 4))
    return {"rows": rows, "tokens": int(lengths.sum()), "seconds": seconds}


if __name__ == "__main__":
    main()
