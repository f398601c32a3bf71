"""Keys from the command line to the gateway's memory, and what is never written down."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.config import UserError
from tunesmith.serve.govern.database import open_gateway
from tunesmith.serve.govern.keys import (
    create_key,
    read_book,
    revoke_key,
    rotate_key,
    set_group,
)
from tunesmith.serve.govern.limits import Limits


def test_a_key_is_found_by_its_whole_text_alone(tmp_path: Path) -> None:
    engine = open_gateway(tmp_path)
    key_id, text = create_key(engine, "ann", group="lab", models=("bot",))
    other_id, other = create_key(engine, "bob")
    book, now_s = read_book(engine), time.time()
    found = book.find(text, now_s)
    assert found and (found.id, found.name, found.group) == (key_id, "ann", "lab")
    assert found.may_ask("bot") and not found.may_ask("other")
    swapped = text.replace(key_id, other_id)
    for wrong in ("", "ts", text[:-1], text + "x", swapped, text.upper(), "é\udc80", f"x{text}"):
        assert book.find(wrong, now_s) is None, wrong
    assert (book.find(other, now_s) or found).id == other_id
    stored = b"".join(path.read_bytes() for path in (tmp_path / "serve").iterdir())
    for whole in (text, other):
        assert whole.split("-", 2)[2].encode() not in stored
    assert (tmp_path / "serve" / "gateway.db").stat().st_mode & 0o077 == 0


def test_expiry_rotation_and_revocation(tmp_path: Path) -> None:
    engine, now_s = open_gateway(tmp_path), time.time()
    key_id, old = create_key(engine, "ann", expires_s=now_s + 1000)
    new = rotate_key(engine, key_id, overlap_s=100)
    book = read_book(engine)
    assert book.find(old, now_s + 50) and book.find(new, now_s + 50)
    assert not book.find(old, now_s + 150) and book.find(new, now_s + 150)
    assert not book.find(new, now_s + 1001)
    newest = rotate_key(engine, key_id, overlap_s=0)
    book = read_book(engine, book)
    assert not book.find(new, now_s) and book.find(newest, now_s)
    revoke_key(engine, key_id)
    assert not read_book(engine, book).find(newest, now_s)
    for act in (lambda: revoke_key(engine, key_id), lambda: rotate_key(engine, "0", overlap_s=1)):
        with pytest.raises(UserError):
            act()


def test_the_book_is_read_again_only_after_a_change(tmp_path: Path) -> None:
    engine = open_gateway(tmp_path)
    create_key(engine, "ann", group="lab")
    book = read_book(engine)
    assert read_book(engine, book) is book
    set_group(engine, "lab", Limits(usd_per_day=2.5))
    (key,) = read_book(engine, book).keys.values()
    assert key.subjects["group", "lab"] == Limits(usd_per_day=2.5)
    assert read_book(open_gateway(tmp_path)).keys == {key.id: key}


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()

    def tunesmith(*arguments: str) -> Any:
        return CliRunner().invoke(app, [*arguments, "--store", str(tmp_path)])

    made = tunesmith("keys", "create", "ann", "--group", "lab", "--usd-per-day", "5", "--json")
    key = json.loads(made.stdout)
    assert key["key"].startswith(f"ts-{key['id']}-")
    assert tunesmith("keys", "group", "lab", "--tokens-per-day", "1000").exit_code == 0
    listed = json.loads(tunesmith("keys", "list", "--json").stdout)["keys"]
    assert [(one["name"], one["state"], one["limits"]) for one in listed] == [
        ("ann", "active", {"usd_per_day": 5.0})
    ]
    assert listed[0]["group_limits"] == {"tokens_per_day": 1000}
    assert "sha256" not in json.dumps(listed)
    assert isinstance(
        tunesmith("keys", "rotate", key["id"], "--overlap", "1x").exception, UserError
    )
    assert tunesmith("keys", "revoke", key["id"]).exit_code == 0
    assert "revoked" in tunesmith("keys", "list").stdout
    assert json.loads(tunesmith("usage", "--json").stdout)["lines"] == []
    assert "key, group, model" in str(tunesmith("usage", "--by", "colour").exception)
