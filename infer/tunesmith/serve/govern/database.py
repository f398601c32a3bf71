"""The gateway's own database: keys and groups, what each has spent, where routes were moved to, and
the request log."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from tunesmith.ledger import open_database

FILE = "gateway.db"

_schema = sa.MetaData()

groups = sa.Table(
    "groups",
    _schema,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("limits", sa.JSON, nullable=False),
)
keys = sa.Table(
    "keys",
    _schema,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("group", sa.ForeignKey("groups.name")),
    sa.Column("models", sa.JSON, nullable=False),
    sa.Column("limits", sa.JSON, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("expires_s", sa.Float),
    sa.Column("revoked_s", sa.Float),
    # The secret before a rotation, which is good until the overlap ends.
    sa.Column("old_sha256", sa.String(64)),
    sa.Column("old_expires_s", sa.Float),
)
changes = sa.Table(
    "changes",
    _schema,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at_s", sa.Float, nullable=False),
    sa.Column("what", sa.String(400), nullable=False),
    sqlite_autoincrement=True,
)
"""Every change of keys and groups; the newest `seq` tells a gateway whether to read them again."""

spending = sa.Table(
    "spending",
    _schema,
    sa.Column("day", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String(8), primary_key=True),
    sa.Column("subject", sa.String(200), primary_key=True),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("nano_usd", sa.BigInteger, nullable=False),
)
routing = sa.Table(
    "routing",
    _schema,
    sa.Column("route", sa.String(200), primary_key=True),
    sa.Column("arms", sa.JSON, nullable=False),
    # The recipe's own arms with their artifacts: what it says now holds again once they differ.
    sa.Column("declared", sa.JSON, nullable=False),
    sa.Column("at_s", sa.Float, nullable=False),
)
"""Routes that were moved away from what the recipe says."""

brought = sa.Table(
    "brought",
    _schema,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("route", sa.String(200), nullable=False),
    sa.Column("reference", sa.String(4096), nullable=False),
    sa.Column("artifact", sa.String(200), nullable=False),
)
"""Upstreams that no recipe names, and what they are made of."""

commands = sa.Table(
    "commands",
    _schema,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at_s", sa.Float, nullable=False),
    sa.Column("route", sa.String(200), nullable=False),
    sa.Column("what", sa.String(16), nullable=False),
    sa.Column("target", sa.String(4096)),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("message", sa.Text),
    sqlite_autoincrement=True,
)
"""What people ask of a running gateway."""

rollouts = sa.Table(
    "rollouts",
    _schema,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("route", sa.String(200), nullable=False, index=True),
    sa.Column("candidate", sa.String(200), nullable=False),
    sa.Column("artifact", sa.String(200), nullable=False),
    sa.Column("baseline", sa.JSON, nullable=False),
    sa.Column("plan", sa.JSON, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("evidence", sa.JSON, nullable=False),
    sa.Column("started_s", sa.Float, nullable=False),
    sa.Column("changed_s", sa.Float, nullable=False),
    sqlite_autoincrement=True,
)
decisions = sa.Table(
    "decisions",
    _schema,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("rollout", sa.ForeignKey("rollouts.id"), nullable=False, index=True),
    sa.Column("at_s", sa.Float, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("action", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("signals", sa.JSON, nullable=False),
    sa.Column("evidence", sa.JSON, nullable=False),
    sqlite_autoincrement=True,
)
requests = sa.Table(
    "requests",
    _schema,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("request_id", sa.String(64), nullable=False, index=True),
    sa.Column("response_id", sa.String(128), index=True),
    sa.Column("at_s", sa.Float, nullable=False),
    sa.Column("key_id", sa.String(16)),
    sa.Column("key_name", sa.String(200)),
    sa.Column("group", sa.String(200)),
    sa.Column("method", sa.String(16), nullable=False),
    sa.Column("path", sa.String(400), nullable=False),
    sa.Column("model", sa.String(200)),
    sa.Column("artifact", sa.String(64)),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("ending", sa.String(16), nullable=False),
    sa.Column("finish_reason", sa.String(32)),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("cached_tokens", sa.Integer, nullable=False),
    sa.Column("output_tokens", sa.Integer, nullable=False),
    sa.Column("is_estimated", sa.Boolean, nullable=False),
    sa.Column("nano_usd", sa.BigInteger),
    sa.Column("ttft_s", sa.Float),
    sa.Column("duration_s", sa.Float, nullable=False),
    sa.Column("request_body", sa.Text),
    sa.Column("response_body", sa.Text),
    sa.Column("guardrails", sa.Text),
    sa.Column("route", sa.String(200)),
    sa.Column("arm", sa.String(200)),
    sa.Column("version", sa.String(200)),
    sa.Column("attempts", sa.Integer),
    sa.Column("purpose", sa.String(16)),
    sa.Column("experiment", sa.String(200)),
    # Files are named after these numbers, so none may come twice.
    sqlite_autoincrement=True,
)

feedback = sa.Table(
    "feedback",
    _schema,
    sa.Column("request_seq", sa.Integer, primary_key=True),
    # The key that gave it; empty where that was none of those that `tunesmith keys` makes.
    sa.Column("giver", sa.String(16), primary_key=True),
    sa.Column("at_s", sa.Float, nullable=False),
    sa.Column("score", sa.Float),
    sa.Column("label", sa.String(64)),
    sa.Column("correction", sa.Text),
    sa.Column("comment", sa.Text),
)
"""What people say of answers; `request_seq` is the line of the request log."""


def open_gateway(store: Path) -> Engine:
    """The database of a store's gateway, made on first use."""
    folder = store / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.touch(mode=0o600)
    engine = open_database(f"sqlite:///{path}")
    _schema.create_all(engine)
    _add_columns(engine)
    return engine


def _add_columns(engine: Engine) -> None:
    """Give the tables of a database that an older version made the columns that came later; such
    columns are always nullable."""
    with engine.begin() as db:
        for table in _schema.sorted_tables:
            there = {column["name"] for column in sa.inspect(db).get_columns(table.name)}
            for column in table.columns:
                if column.name not in there:
                    kind = column.type.compile(engine.dialect)
                    db.execute(sa.text(f'ALTER TABLE "{table.name}" ADD "{column.name}" {kind}'))
