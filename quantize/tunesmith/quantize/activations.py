"""Hidden states of the calibration examples between two layers, in a file that outlives a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.quantize.weights import replace_synced


@dataclass(frozen=True)
class Activations:
    """A line of JSON with type and width, then the numbers of every example, one after another."""

    path: Path
    tokens: Sequence[tuple[int, int]]
    """Rows and tokens of each example; all of its states have the model's width."""

    def read(self, device: Any) -> Iterator[Any]:
        """The states of one example after another, in the order in which they were written."""
        import torch

        with self.path.open("rb") as file:
            header = json.loads(file.readline())
            for rows, tokens in self.tokens:
                hidden_BSD = torch.empty(
                    (rows, tokens, header["width"]), dtype=getattr(torch, header["dtype"])
                )
                file.readinto(_bytes(hidden_BSD))
                yield hidden_BSD.to(device)

    @contextmanager
    def write(self) -> Iterator[Any]:
        """Yields what takes the states of one example; the file has its name when all are in."""
        half = self.path.with_suffix(".half")
        with half.open("wb") as file:

            def append(hidden_BSD: Any) -> None:
                states = hidden_BSD.detach().contiguous().cpu()
                if file.tell() == 0:
                    dtype = str(states.dtype).removeprefix("torch.")
                    header = {"dtype": dtype, "width": states.shape[-1]}
                    file.write(json.dumps(header).encode() + b"\n")
                file.write(_bytes(states))

            yield append
        replace_synced(half, self.path)


def _bytes(tensor: Any) -> Any:
    """A tensor's memory, whatever its type; numpy has no bfloat16."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()
