"""What an artifact says about itself, and the id that the same work always gets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal["dataset", "base", "adapter", "checkpoint", "batch", "eval", "bench"]
MANIFEST = "manifest.json"


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size_bytes: int
    sha256: str


class Cost(BaseModel):
    """What making the artifact took."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device_seconds: float
    """Wall seconds times devices, over every attempt."""

    usd: float | None
    """`device_seconds` at the recipe's price; null when it names none."""


class Manifest(BaseModel):
    """`manifest.json`: everything needed to verify an artifact and to make it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    id: str
    kind: Kind
    name: str
    """The recipe's name; versions are counted under it."""
    label: str
    """What it is within the recipe: `tuned`, `w4a16`, `eval tuned`, …"""
    created_at: datetime
    section: dict[str, Any]
    """The part of the resolved recipe that decides the result."""
    inputs: dict[str, str]
    """SHA-256 of everything that was read from outside the store, by name."""
    parents: dict[str, str]
    """Role → artifact id."""
    files: dict[str, FileEntry]
    external_root: str | None = None
    """Folder of the files when they stay where they were found (a base on disk or in a cache)."""
    metrics: dict[str, Any]
    environment: dict[str, Any]
    cost: Cost

    def to_text(self) -> str:
        """The one spelling that is written to disk."""
        return self.model_dump_json(indent=1)


@dataclass(frozen=True)
class Draft:
    """An artifact that may or may not exist yet: what decides its id, known before any work."""

    kind: Kind
    label: str
    name: str
    section: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    parents: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest) -> Draft:
        """The draft that a finished artifact was made from."""
        return cls(
            kind=manifest.kind,
            label=manifest.label,
            name=manifest.name,
            section=manifest.section,
            inputs=manifest.inputs,
            parents=manifest.parents,
        )

    @classmethod
    def read(cls, path: Path) -> Draft | None:
        """What `to_text` wrote; None when a kill cut it short."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps({item.name: getattr(self, item.name) for item in fields(self)})

    @property
    def id(self) -> str:
        """`kind-` and 12 hex digits over kind, recipe section, content digests and parents."""
        identity = {
            "kind": self.kind,
            "section": self.section,
            "inputs": self.inputs,
            "parents": sorted(self.parents.items()),
        }
        return f"{self.kind}-{hashlib.sha256(canonical_json(identity)).hexdigest()[:12]}"


@dataclass(frozen=True)
class Artifact:
    """A finished, immutable artifact."""

    folder: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def root(self) -> Path:
        """Where its files are: its own folder, or the place they were found at."""
        external = self.manifest.external_root
        return Path(external) if external else self.folder

    @classmethod
    def read(cls, folder: Path) -> Artifact:
        """Raises OSError or ValueError when the manifest is missing or malformed."""
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        return cls(folder, Manifest.model_validate_json(text))


def canonical_json(value: object) -> bytes:
    """One spelling per value: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
