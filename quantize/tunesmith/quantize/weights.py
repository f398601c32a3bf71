"""Weights on disk: read a tensor at a time, written a part at a time, joined when all are there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import TunesmithError, require
from tunesmith.ledger.durable import sync

_ONE_FILE_BYTES = 4 * 2**30
"""Weights up to this size become one file; more stay in the parts they were made in."""

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """The tensors of a model folder."""

    files: Mapping[str, Path]
    """Which file holds a tensor."""

    @classmethod
    def of(cls, folder: Path) -> Weights:
        """Those in safetensors files; none where the folder has other files."""
        return cls(
            {
                name: path
                for path in sorted(folder.glob("*.safetensors"))
                for name in _open(path).keys()  # noqa: SIM118 - a file handle, not a dict
            }
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(_open(self.files[name]).get_slice(name).get_shape())

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Each tensor in memory of its own, so that the file can be let go of."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.files[name], []).append(name)
        for path, chosen in wanted.items():
            for name in chosen:
                # A handle keeps all that was read through it mapped, and so resident.
                yield name, _open(path).get_tensor(name).clone()


def write_part(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors so that the file is there whole, or not at all."""
    from safetensors.torch import save_file

    half = path.with_name(f"{path.name}.half")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, half, {"format": "pt"}
    )
    replace_synced(half, path)


def replace_synced(half: Path, path: Path) -> None:
    """Give a finished file its name, and wait until the disk has both."""
    sync(half)
    os.replace(half, path)
    sync(path.parent)


def join(parts: list[Path], out: Path) -> None:
    """Deliver parts as one file, or as they are with an index; they stay where they were."""
    if sum(part.stat().st_size for part in parts) <= _ONE_FILE_BYTES:
        _concatenate(parts, out / "model.safetensors")
        return
    places: dict[str, str] = {}
    size_bytes = 0
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _link(part, out / name)
        header, _ = _header(part)
        places |= dict.fromkeys(header, name)
        size_bytes += sum(end - begin for begin, end in _offsets(header))
    index = {"metadata": {"total_size": size_bytes}, "weight_map": places}
    (out / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def _concatenate(parts: list[Path], path: Path) -> None:
    """One safetensors file of the tensors of several, without holding them in memory."""
    joined: dict[str, Any] = {}
    starts = []
    written = 0
    for part in parts:
        header, start = _header(part)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            joined[name] = entry | {"data_offsets": [written + begin, written + end]}
        starts.append(start)
        written += part.stat().st_size - start
    text = json.dumps({"__metadata__": {"format": "pt"}, **joined}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part, start in zip(parts, starts, strict=True):
            with part.open("rb") as source:
                source.seek(start)
                shutil.copyfileobj(source, file, 2**22)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Type, shape and place of every tensor of a safetensors file, and where the data begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _offsets(header: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    for entry in header.values():
        begin, end = entry["data_offsets"]
        yield begin, end


def _link(source: Path, path: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(source, path)
        return
    shutil.copyfile(source, path)


def _open(path: Path) -> Any:
    safetensors = require("safetensors", "quantize")
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise TunesmithError(f"{path}: not a readable safetensors file: {error}") from error
