"""API keys: made once, shown once, kept as a hash, and read by the gateway into memory.

A key is `ts-<id>-<secret>`. The secret has 256 random bits, so that one round of SHA-256 is as good
as a slow hash, which exists to protect secrets that people choose.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from tunesmith.config import UserError
from tunesmith.serve.govern.database import changes, groups, keys
from tunesmith.serve.govern.governor import Subject
from tunesmith.serve.govern.limits import Limits

_PREFIX = "ts"
_NO_HASH = "0" * 64


@dataclass(frozen=True)
class Key:
    """A key without its secret."""

    id: str
    name: str
    group: str | None
    models: tuple[str, ...]
    """Names of the models that it may ask; all when empty."""

    limits: Limits
    group_limits: Limits
    sha256: str
    created_s: float
    expires_s: float | None
    revoked_s: float | None
    old_sha256: str | None
    old_expires_s: float | None

    def may_ask(self, model: str) -> bool:
        """Whether a model is among those of the key."""
        return not self.models or model in self.models

    @cached_property
    def subjects(self) -> dict[Subject, Limits]:
        """Whose limits hold for it."""
        found: dict[Subject, Limits] = {("key", self.id): self.limits}
        return found | ({("group", self.group): self.group_limits} if self.group else {})

    def state(self, now_s: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_s is not None:
            return "revoked"
        return "expired" if self.expires_s is not None and now_s >= self.expires_s else "active"


class KeyBook:
    """All keys at one moment; looking one up takes no database."""

    def __init__(self, found: Mapping[str, Key], seq: int) -> None:
        self.keys = found
        self.seq = seq
        """The newest change that is in it."""

    def find(self, text: str, now_s: float) -> Key | None:
        """The active key that a client has sent, compared in constant time; None for any other."""
        prefix, _, rest = text.partition("-")
        key_id, _, secret = rest.partition("-")
        key = self.keys.get(key_id)
        given = _hash(secret)
        is_right = hmac.compare_digest(given, key.sha256 if key else _NO_HASH)
        is_old = hmac.compare_digest(given, (key.old_sha256 if key else None) or _NO_HASH)
        if key is None or prefix != _PREFIX or key.state(now_s) != "active":
            return None
        in_overlap = key.old_expires_s is not None and now_s < key.old_expires_s
        return key if is_right or (is_old and in_overlap) else None


def read_book(engine: Engine, known: KeyBook | None = None) -> KeyBook:
    """The keys as they are now; `known` itself where nothing has changed."""
    with engine.connect() as db:
        seq = db.scalar(sa.select(sa.func.max(changes.c.seq))) or 0
        if known and known.seq == seq:
            return known
        limits = {row.name: Limits(**row.limits) for row in db.execute(sa.select(groups))}
        found = {}
        for row in db.execute(sa.select(keys).order_by(keys.c.created_s)).mappings():
            fields = dict(row) | {
                "models": tuple(row["models"]),
                "limits": Limits(**row["limits"]),
                "group_limits": limits.get(row["group"], Limits()),
            }
            found[row["id"]] = Key(**fields)
    return KeyBook(found, seq)


def create_key(
    engine: Engine,
    name: str,
    *,
    group: str | None = None,
    models: tuple[str, ...] = (),
    limits: Limits = Limits(),  # noqa: B008 - frozen
    expires_s: float | None = None,
) -> tuple[str, str]:
    """A new key: its id, and the text that only its owner will ever see again."""
    key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    with engine.begin() as db:
        if group is not None:
            _ensure_group(db, group)
        db.execute(
            keys.insert().values(
                id=key_id,
                name=name,
                group=group,
                models=list(models),
                limits=limits.given(),
                sha256=_hash(secret),
                created_s=time.time(),
                expires_s=expires_s,
            )
        )
        _note(db, f"created {key_id} ({name})")
    return key_id, f"{_PREFIX}-{key_id}-{secret}"


def rotate_key(engine: Engine, key_id: str, *, overlap_s: float) -> str:
    """A new secret for a key, whose use and limits go on; the old one is good for `overlap_s`."""
    secret = secrets.token_urlsafe(32)
    with engine.begin() as db:
        row = _active(db, key_id)
        old: dict[str, Any] = {"old_sha256": None, "old_expires_s": None}
        if overlap_s > 0:
            old = {"old_sha256": row.sha256, "old_expires_s": time.time() + overlap_s}
        db.execute(keys.update().where(keys.c.id == key_id).values(sha256=_hash(secret), **old))
        _note(db, f"rotated {key_id}")
    return f"{_PREFIX}-{key_id}-{secret}"


def revoke_key(engine: Engine, key_id: str) -> None:
    """End a key for good; running gateways learn of it within a second."""
    with engine.begin() as db:
        _active(db, key_id)
        db.execute(keys.update().where(keys.c.id == key_id).values(revoked_s=time.time()))
        _note(db, f"revoked {key_id}")


def set_group(engine: Engine, name: str, limits: Limits) -> None:
    """Give a group its limits, which all its keys share."""
    with engine.begin() as db:
        _ensure_group(db, name)
        db.execute(groups.update().where(groups.c.name == name).values(limits=limits.given()))
        _note(db, f"limits of group {name}")


def _active(db: Connection, key_id: str) -> Any:
    row = db.execute(sa.select(keys).where(keys.c.id == key_id)).first()
    if row is None:
        raise UserError(f"there is no key {key_id}; see: tunesmith keys list")
    if row.revoked_s is not None:
        raise UserError(
            f"the key {key_id} was revoked already; make another: tunesmith keys create"
        )
    return row


def _ensure_group(db: Connection, name: str) -> None:
    if db.scalar(sa.select(groups.c.name).where(groups.c.name == name)) is None:
        db.execute(groups.insert().values(name=name, limits={}))


def _note(db: Connection, what: str) -> None:
    db.execute(changes.insert().values(at_s=time.time(), what=what))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
