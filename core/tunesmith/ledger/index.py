"""The index over manifests: artifacts, versions, aliases with history, and a digest cache.

SQLite in WAL mode by default, or any database that SQLAlchemy speaks to. Everything here but the
aliases can be rebuilt from the manifests.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.schema import CreateIndex, CreateTable

from tunesmith.config.errors import GateError, TunesmithError, UnknownArtifactError
from tunesmith.ledger.database import open_database
from tunesmith.ledger.manifest import Manifest

_OPEN_TIMEOUT_S = 3.0

_schema = sa.MetaData()
_artifacts = sa.Table(
    "artifacts",
    _schema,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("name", sa.String(200), nullable=False, index=True),
    sa.Column("label", sa.String(200), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("manifest", sa.JSON, nullable=False),
    sa.UniqueConstraint("name", "label", "version"),
)
_parents = sa.Table(
    "parents",
    _schema,
    sa.Column("child", sa.ForeignKey("artifacts.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("role", sa.String(64), primary_key=True),
    sa.Column("parent", sa.String(64), nullable=False, index=True),
)
_aliases = sa.Table(
    "aliases",
    _schema,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("alias", sa.String(64), primary_key=True),
    sa.Column("artifact", sa.String(64), nullable=False),
)
_alias_history = sa.Table(
    "alias_history",
    _schema,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("alias", sa.String(64), nullable=False),
    sa.Column("before", sa.String(64)),
    sa.Column("after", sa.String(64), nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
_digests = sa.Table(
    "digests",
    _schema,
    sa.Column("path", sa.String(4096), primary_key=True),
    sa.Column("stat", sa.String(200), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
)


@dataclass(frozen=True)
class Row:
    """One line of the index."""

    id: str
    kind: str
    name: str
    label: str
    version: int
    manifest: Manifest


class Index:
    """Opened per command; cheap to open, safe to share between processes."""

    def __init__(self, url: str) -> None:
        self._engine = open_database(url)
        deadline_s = time.monotonic() + _OPEN_TIMEOUT_S
        while True:
            # Processes that open a new ledger together collide: in PostgreSQL the second one finds
            # the table made, and SQLite's change to WAL mode does not wait for its busy timeout.
            try:
                self._create_tables()
                return
            except DBAPIError as error:
                if time.monotonic() > deadline_s:
                    shown = self._engine.url.render_as_string(hide_password=True)
                    raise TunesmithError(f"cannot open the ledger {shown}: {error.orig}") from error
                time.sleep(0.05)

    def _create_tables(self) -> None:
        with self._engine.begin() as db:
            for table in _schema.sorted_tables:
                db.execute(CreateTable(table, if_not_exists=True))
                for index in sorted(table.indexes, key=lambda index: str(index.name)):
                    db.execute(CreateIndex(index, if_not_exists=True))

    def close(self) -> None:
        """Give every connection back."""
        self._engine.dispose()

    def add(self, manifest: Manifest) -> None:
        """Index one manifest; a second time changes nothing."""
        for _attempt in range(20):
            try:
                with self._engine.begin() as db:
                    self._insert(db, manifest)
                return
            except IntegrityError:
                # Another process took the version number, or indexed the same artifact.
                continue
        raise TunesmithError(f"cannot index {manifest.id}: its version number is always taken")

    def _insert(self, db: Connection, manifest: Manifest) -> None:
        if db.scalar(sa.select(_artifacts.c.id).where(_artifacts.c.id == manifest.id)):
            return
        newest = db.scalar(
            sa.select(sa.func.max(_artifacts.c.version)).where(
                _artifacts.c.name == manifest.name, _artifacts.c.label == manifest.label
            )
        )
        db.execute(
            _artifacts.insert().values(
                id=manifest.id,
                kind=manifest.kind,
                name=manifest.name,
                label=manifest.label,
                version=(newest or 0) + 1,
                created_at=manifest.created_at,
                manifest=manifest.model_dump(mode="json"),
            )
        )
        for role, parent in manifest.parents.items():
            db.execute(_parents.insert().values(child=manifest.id, role=role, parent=parent))

    def rebuild(self, manifests: Iterable[Manifest]) -> int:
        """Forget every artifact and index these again, oldest first; aliases stay."""
        ordered = sorted(manifests, key=lambda manifest: (manifest.created_at, manifest.id))
        with self._engine.begin() as db:
            db.execute(_parents.delete())
            db.execute(_artifacts.delete())
            for manifest in ordered:
                self._insert(db, manifest)
        return len(ordered)

    def find(self, artifact_id: str) -> Row | None:
        """The row of an id, or None."""
        rows = self._rows(_artifacts.c.id == artifact_id)
        return rows[0] if rows else None

    def all(self, name: str | None = None) -> list[Row]:
        """Every row, oldest first; only those of one recipe name when given."""
        return self._rows(_artifacts.c.name == name if name else sa.true())

    def _rows(self, where: sa.ColumnElement[bool]) -> list[Row]:
        query = (
            sa.select(_artifacts).where(where).order_by(_artifacts.c.created_at, _artifacts.c.id)
        )
        with self._engine.connect() as db:
            return [
                Row(r.id, r.kind, r.name, r.label, r.version, Manifest.model_validate(r.manifest))
                for r in db.execute(query)
            ]

    def children(self, artifact_id: str) -> list[tuple[str, str]]:
        """(role, id) of what was made from an artifact."""
        query = (
            sa.select(_parents.c.role, _parents.c.child)
            .where(_parents.c.parent == artifact_id)
            .order_by(_parents.c.child)
        )
        with self._engine.connect() as db:
            return [(row.role, row.child) for row in db.execute(query)]

    def alias(self, name: str, alias: str) -> str:
        """The id an alias points to."""
        query = sa.select(_aliases.c.artifact).where(
            _aliases.c.name == name, _aliases.c.alias == alias
        )
        with self._engine.connect() as db:
            found = db.scalar(query)
        if found is None:
            raise UnknownArtifactError(f'{name} has no alias "{alias}"; see: tunesmith show {name}')
        return str(found)

    def aliases(self, name: str) -> dict[str, str]:
        """Alias → id."""
        query = sa.select(_aliases.c.alias, _aliases.c.artifact).where(_aliases.c.name == name)
        with self._engine.connect() as db:
            return {row.alias: row.artifact for row in db.execute(query)}

    def set_alias(self, name: str, alias: str, artifact_id: str, *, expected: str | None) -> None:
        """Move an alias from `expected` (None: it must not exist) in one step, and keep the step.

        Raises GateError when somebody else moved it first.
        """
        row = self.find(artifact_id)
        if row is None or row.name != name:
            raise UnknownArtifactError(f"{artifact_id} is not an artifact of {name}")
        key = {"name": name, "alias": alias}
        try:
            with self._engine.begin() as db:
                if expected is None:
                    db.execute(_aliases.insert().values(**key, artifact=artifact_id))
                else:
                    moved = db.execute(
                        _aliases.update()
                        .where(
                            _aliases.c.name == name,
                            _aliases.c.alias == alias,
                            _aliases.c.artifact == expected,
                        )
                        .values(artifact=artifact_id)
                    )
                    if moved.rowcount != 1:
                        raise GateError(f"{name}@{alias} is not at {expected}; nothing was moved")
                db.execute(
                    _alias_history.insert().values(
                        **key, before=expected, after=artifact_id, at=time.time()
                    )
                )
        except IntegrityError as error:
            raise GateError(f"{name}@{alias} exists already; nothing was moved") from error

    def alias_history(self, name: str, alias: str) -> list[tuple[str | None, str, float]]:
        """(before, after, unix seconds) of every move, oldest first."""
        query = (
            sa.select(_alias_history)
            .where(_alias_history.c.name == name, _alias_history.c.alias == alias)
            .order_by(_alias_history.c.seq)
        )
        with self._engine.connect() as db:
            return [(row.before, row.after, row.at) for row in db.execute(query)]

    def digest(self, path: Path, stat: str) -> str | None:
        """A remembered SHA-256, if the file's stat is still the same."""
        query = sa.select(_digests.c.sha256).where(
            _digests.c.path == str(path), _digests.c.stat == stat
        )
        with self._engine.connect() as db:
            return db.scalar(query)

    def remember_digest(self, path: Path, stat: str, sha256: str) -> None:
        """Keep a digest for the next command."""
        try:
            with self._engine.begin() as db:
                db.execute(_digests.delete().where(_digests.c.path == str(path)))
                db.execute(_digests.insert().values(path=str(path), stat=stat, sha256=sha256))
        except IntegrityError:
            pass  # another process remembered it at the same moment
