"""Copies of adapters that belong to the gateway, so that nobody can change or delete what an engine
may read again at any time."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tunesmith.config import ModelError
from tunesmith.ledger.durable import sync_tree

_NEEDED = ("adapter_config.json", "adapter_model.safetensors")
_TEMPLATE = "chat_template.jinja"
_COPIED = (*_NEEDED, _TEMPLATE, "manifest.json")
_HASH_LENGTH = 12


@dataclass(frozen=True)
class Pin:
    """One version of an adapter."""

    hash: str
    """Of its configuration, weights and chat template."""

    folder: Path

    @property
    def template(self) -> str | None:
        """The chat template that it was trained with, where it says."""
        path = self.folder / _TEMPLATE
        return path.read_text(encoding="utf-8") if path.is_file() else None


def pin(source: Path, pins: Path) -> Pin:
    """The copy of an adapter, made where there is none yet. Raises ModelError when `source` is no
    adapter."""
    for name in _NEEDED:
        if not (source / name).is_file():
            raise ModelError(f"{source} is no adapter: it has no {name}")
    pins.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=pins))
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    # Of the copy, which nobody changes meanwhile.
    found = Pin(_hash(partial), pins / _hash(partial))
    if found.folder.is_dir():
        shutil.rmtree(partial)
    else:
        sync_tree(partial)
        partial.rename(found.folder)
    return found


def unpin(found: Pin) -> None:
    """Delete a copy that no engine knows any more."""
    shutil.rmtree(found.folder, ignore_errors=True)


def _hash(folder: Path) -> str:
    whole = hashlib.sha256()
    for name in (*_NEEDED, _TEMPLATE):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                whole.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()[:_HASH_LENGTH]
