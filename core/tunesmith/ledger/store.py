"""A folder of artifacts and its index: find what is made, write what is not, verify all of it.

FOLDER/artifacts/<id>/   finished and immutable
FOLDER/work/<id>/        in progress: `out/` becomes the artifact, the rest survives a kill;
                         `draft.json` is what decides the id
FOLDER/ledger.db         the index, unless the recipe names another
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunesmith.config.errors import GateError, TunesmithError, UnknownArtifactError
from tunesmith.config.load import dump_recipe
from tunesmith.config.schema import Recipe
from tunesmith.ledger.durable import sync, sync_tree, write_synced
from tunesmith.ledger.environment import describe_environment, device_count
from tunesmith.ledger.index import Index
from tunesmith.ledger.manifest import (
    MANIFEST,
    Artifact,
    Cost,
    Draft,
    FileEntry,
    Manifest,
    hash_file,
)

RESOLVED = "recipe.resolved.yaml"
_DRAFT = "draft.json"


@dataclass
class Work:
    """An artifact being made."""

    draft: Draft
    out: Path
    """Everything left here when the `with` block ends is the artifact."""

    scratch: Path
    """Kept across kills and interruptions, dropped when the artifact is finished."""

    metrics: dict[str, Any] = field(default_factory=dict)
    external_root: Path | None = None
    """Set it to record files where they are in place of writing them to `out`."""
    share: float = 1.0
    """Its part of the time, where several artifacts are made at once."""


class Store:
    """Artifacts on disk and their index."""

    def __init__(self, folder: Path, ledger_url: str | None = None) -> None:
        self.folder = folder.absolute()
        self._artifacts = self.folder / "artifacts"
        self._work = self.folder / "work"
        try:
            self._artifacts.mkdir(parents=True, exist_ok=True)
            self._work.mkdir(exist_ok=True)
        except OSError as error:
            raise TunesmithError(f"cannot use {self.folder} as the store: {error}") from error
        self.index = Index(ledger_url or f"sqlite:///{self.folder / 'ledger.db'}")

    @classmethod
    def of(cls, recipe: Recipe) -> Store:
        """The store a recipe names."""
        return cls(recipe.store.folder, recipe.store.ledger)

    def find(self, artifact_id: str) -> Artifact | None:
        """A finished artifact, or None. The folder decides; the index is mended to match it."""
        folder = self._artifacts / artifact_id
        if not (folder / MANIFEST).exists():
            return None
        artifact = Artifact.read(folder)
        if self.index.find(artifact_id) is None:
            self.index.add(artifact.manifest)
        return artifact

    def get(self, reference: str) -> Artifact:
        """By id, by `NAME@ALIAS`, or by an id's unique beginning."""
        artifact_id = self.resolve(reference)
        try:
            artifact = self.find(artifact_id)
        except ValueError as error:
            raise GateError(f"{artifact_id}: its {MANIFEST} is damaged") from error
        if artifact is None:
            raise UnknownArtifactError(f"{artifact_id} is not in {self.folder}")
        return artifact

    def resolve(self, reference: str) -> str:
        """The id of an artifact folder. Raises UnknownArtifactError when there is none."""
        if "@" in reference:
            name, _, alias = reference.partition("@")
            reference = self.index.alias(name, alias)
        if (self._artifacts / reference / MANIFEST).exists():
            return reference
        matches = sorted(self._artifacts.glob(f"{reference}*")) if len(reference) > 3 else []
        if len(matches) == 1:
            return matches[0].name
        several = f"; it could be {', '.join(m.name for m in matches[:5])}" if matches else ""
        raise UnknownArtifactError(
            f"no artifact {reference} in {self.folder}{several}; `tunesmith show` lists all"
        )

    @contextlib.contextmanager
    def write(self, draft: Draft, recipe: Recipe) -> Iterator[Work]:
        """Make an artifact: yield its work folder, then hash, record and rename it into place.

        After a kill the same draft gets the same folder with all that was left in it. Raises
        TunesmithError when another process is making the same artifact.
        """
        base = self._work / draft.id
        with self._lock(draft.id):
            base.mkdir(exist_ok=True)
            work = Work(draft, out=base / "out", scratch=self.scratch(draft))
            shutil.rmtree(work.out, ignore_errors=True)
            work.out.mkdir()
            work.scratch.mkdir(exist_ok=True)
            write_synced(base / _DRAFT, draft.to_text())
            clock = _Clock(base / "seconds.json")
            try:
                yield work
            finally:
                clock.save()
            write_synced(work.out / RESOLVED, dump_recipe(recipe))
            manifest = self._manifest(work, recipe, clock.total_s)
            write_synced(work.out / MANIFEST, manifest.to_text())
            sync_tree(work.out)
            os.rename(work.out, self._artifacts / draft.id)
            sync(self._artifacts)
            self.index.add(manifest)
            shutil.rmtree(base, ignore_errors=True)

    def _manifest(self, work: Work, recipe: Recipe, wall_s: float) -> Manifest:
        device_s = wall_s * device_count() * work.share
        price = recipe.price.gpu_hour_usd if recipe.price else None
        return Manifest(
            id=work.draft.id,
            kind=work.draft.kind,
            name=work.draft.name,
            label=work.draft.label,
            created_at=datetime.now(UTC),
            section=dict(work.draft.section),
            inputs=dict(work.draft.inputs),
            parents=dict(work.draft.parents),
            files=_entries(work.external_root or work.out),
            external_root=str(work.external_root.absolute()) if work.external_root else None,
            metrics=work.metrics,
            environment=describe_environment(),
            cost=Cost(
                device_seconds=round(device_s, 3),
                usd=None if price is None else device_s / 3600 * price,
            ),
        )

    def in_progress(self, draft: Draft) -> bool:
        """Whether an interrupted attempt left something to resume."""
        return (self._work / draft.id / "seconds.json").exists()

    def interrupted(self, name: str) -> list[Draft]:
        """What a recipe of this name began to make, did not finish and is not making now."""
        drafts = []
        for path in sorted(self._work.glob(f"*/{_DRAFT}")):
            draft = Draft.read(path)
            if draft and draft.name == name:
                with contextlib.suppress(TunesmithError), self._lock(draft.id):
                    drafts.append(draft)
        return drafts

    def scratch(self, draft: Draft) -> Path:
        """Where an attempt at it keeps what outlives the attempt."""
        return self._work / draft.id / "scratch"

    def discard(self, draft: Draft) -> None:
        """Drop an unfinished attempt. Raises TunesmithError while a process is at it."""
        with self._lock(draft.id):
            shutil.rmtree(self._work / draft.id, ignore_errors=True)

    def _lock(self, artifact_id: str) -> contextlib.AbstractContextManager[None]:
        return _locked(self._work / f"{artifact_id}.lock", artifact_id)

    def digest(self, path: Path) -> str:
        """SHA-256 of an input file, remembered while its inode, size and times stay the same."""
        path = path.resolve()
        stat = path.stat()
        key = f"{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        known = self.index.digest(path, key)
        if known is None:
            known = hash_file(path)
            # A file written within the clock's resolution could change again unseen.
            if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2_000_000_000:
                self.index.remember_digest(path, key, known)
        return known

    def digest_folder(self, folder: Path) -> dict[str, str]:
        """Relative path → SHA-256 of every file, hidden ones and caches left out."""
        return {str(path.relative_to(folder)): self.digest(path) for path in _files(folder)}

    def verify(self, reference: str) -> tuple[list[Artifact], list[str]]:
        """Hash an artifact and everything it was made from; returns them and all faults."""
        checked: dict[str, Artifact] = {}
        faults: list[str] = []
        queue = [self.resolve(reference)]
        while queue:
            current = queue.pop(0)
            if current in checked:
                continue
            folder = self._artifacts / current
            try:
                checked[current] = Artifact.read(folder)
            except OSError:
                faults.append(f"{folder / MANIFEST}: missing")
            except ValueError as error:
                faults.append(f"{folder / MANIFEST}: unreadable: {str(error).splitlines()[0]}")
            else:
                faults += self.faults(checked[current])
                queue += checked[current].manifest.parents.values()
        return list(checked.values()), faults

    def faults(self, artifact: Artifact) -> list[str]:
        """Every difference between the manifest and the bytes on disk; empty when it verifies."""
        manifest_path, found = artifact.folder / MANIFEST, []
        indexed = self.index.find(artifact.id)
        if manifest_path.read_text(encoding="utf-8") != artifact.manifest.to_text():
            found.append(f"{manifest_path}: not as it was written")
        if indexed and indexed.manifest != artifact.manifest:
            found.append(f"{manifest_path}: differs from the ledger's copy")
        if Draft.of(artifact.manifest).id != artifact.id or artifact.folder.name != artifact.id:
            found.append(f"{manifest_path}: its contents do not give its id")
        for relative, entry in artifact.manifest.files.items():
            path = artifact.root / relative
            if not path.exists():
                found.append(f"{path}: missing")
            elif path.stat().st_size != entry.size_bytes:
                found.append(f"{path}: {path.stat().st_size} bytes, recorded {entry.size_bytes}")
            elif hash_file(path) != entry.sha256:
                found.append(f"{path}: content differs from the recorded SHA-256")
        if artifact.manifest.external_root is None:
            known = artifact.manifest.files.keys() | {MANIFEST}
            found += [
                f"{path}: not in the manifest"
                for path in _files(artifact.folder)
                if str(path.relative_to(artifact.folder)) not in known
            ]
        return found

    def ancestors(self, artifact: Artifact) -> list[Artifact]:
        """The artifact's parents, their parents and so on, each once, nearest first."""
        seen: dict[str, Artifact] = {}
        queue = list(artifact.manifest.parents.values())
        while queue:
            current = queue.pop(0)
            if current not in seen:
                seen[current] = self.get(current)
                queue += seen[current].manifest.parents.values()
        return list(seen.values())

    def rebuild(self) -> int:
        """Index every manifest in the folder again; returns how many."""
        folders = [path.parent for path in self._artifacts.glob(f"*/{MANIFEST}")]
        return self.index.rebuild(Artifact.read(folder).manifest for folder in folders)


class _Clock:
    """Wall seconds over every attempt at the same work."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before_s = 0.0
        with contextlib.suppress(OSError, ValueError):
            self._before_s = float(json.loads(path.read_text(encoding="utf-8")))
        self._started_s = time.monotonic()
        self.save()

    @property
    def total_s(self) -> float:
        return self._before_s + time.monotonic() - self._started_s

    def save(self) -> None:
        with contextlib.suppress(OSError):
            self._path.write_text(json.dumps(self.total_s), encoding="utf-8")


@contextlib.contextmanager
def _locked(path: Path, artifact_id: str) -> Iterator[None]:
    """One process per artifact; the kernel lets go of the lock when its holder dies."""
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TunesmithError(
                f"another process is making {artifact_id} right now; wait for it and try again"
            ) from error
        yield


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _entries(folder: Path) -> dict[str, FileEntry]:
    return {
        str(path.relative_to(folder)): FileEntry(
            size_bytes=path.stat().st_size, sha256=hash_file(path)
        )
        for path in _files(folder)
    }
