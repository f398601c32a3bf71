"""How long training stands still for a checkpoint: for the copy alone, or until it is on disk.

    python tests/benchmarks/checkpoint_pause.py --mib 300 --rounds 5

Both ways save the same weights and optimizer, in turns; between two saves the last one is on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from tunesmith.train.checkpoint import Checkpoints

WIDTH = 2048


def main() -> None:
    """Print the pauses in milliseconds and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=300, help="trained weights and their optimizer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    options = parser.parse_args()
    accelerator = Accelerator()
    layers = round(options.mib * 2**20 / (3 * 4 * WIDTH**2))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    model.to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, WIDTH, device=accelerator.device)).sum().backward()
    optimizer.step()
    until_copied_ms, until_written_ms = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoints = Checkpoints(Path(folder), accelerator)
        for step in range(2 * options.rounds + 1):
            started = time.monotonic()
            checkpoints.save(step, model, {"optimizer": optimizer}, {"step": step})
            copied = time.monotonic()
            checkpoints.wait()
            if step == 0:  # the first one also finds its memory
                continue
            if step % 2:
                until_copied_ms.append(1e3 * (copied - started))
            else:
                until_written_ms.append(1e3 * (time.monotonic() - started))
        written = sum(path.stat().st_size for path in Path(folder).rglob("*.*"))
    medians = statistics.median(until_copied_ms), statistics.median(until_written_ms)
    figures = {
        "device": str(accelerator.device),
        "checkpoint_mib": round(written / 2**20, 1),
        "until_copied_ms": [round(value, 1) for value in until_copied_ms],
        "until_written_ms": [round(value, 1) for value in until_written_ms],
        "times_shorter": round(medians[1] / medians[0], 1),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
