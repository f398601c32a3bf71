"""The command line: exit codes, messages, and the views on a store."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.config import Recipe
from tunesmith.ledger import Draft, Store

RECIPE = Recipe.model_validate({"name": "bot", "model": {"base": "some/model"}})


def tunesmith(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunesmith.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, cwd=cwd,
    )  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> tuple[Store, str, str]:
    """A store with a parent and a child."""
    store = Store(tmp_path / ".tunesmith")
    parent = Draft("dataset", "data", "bot", {"seed": 1})
    child = Draft("adapter", "adapter", "bot", {"seed": 1}, parents={"data": parent.id})
    for draft in (parent, child):
        with store.write(draft, RECIPE) as work:
            (work.out / "rows.jsonl").write_text(f"{draft.id}\n")
            work.metrics["rows"] = 1
    return store, parent.id, child.id


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("check", "absent.yaml"), 2, "absent.yaml: cannot read the recipe"),
        (("chekc", "absent.yaml"), 2, "No such command"),
        (("check",), 2, "Missing argument"),
        (("show", "--store", "absent"), 2, "absent is not a store"),
        (("alias", "no-at-sign", "x"), 2, "write it as NAME@ALIAS"),
    ],
)
def test_wrong_arguments_end_with_2(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = tunesmith(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_check_names_the_fault_and_the_sections(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: bot\nmodel: {base: x/y}\nserve: {port: 1}\n")
    assert tunesmith("check", path).stdout.endswith("bot: ok (serve)\n")
    done = tunesmith("check", path, "serve.prt=2")
    assert done.returncode == 2
    assert 'did you mean "port"' in done.stderr


def test_schema_is_json_schema(tmp_path: Path) -> None:
    schema = json.loads(tunesmith("schema").stdout)
    assert schema["properties"]["train"]["description"]
    assert schema["additionalProperties"] is False


def test_show_lists_details_and_lineage(made: tuple[Store, str, str]) -> None:
    store, parent, child = made
    listing = tunesmith("show", "--store", store.folder)
    assert parent in listing.stdout and child in listing.stdout
    detail = tunesmith("show", parent, "--store", store.folder)
    assert "Used by" in detail.stdout and f"data: {child}" in detail.stdout
    facts = json.loads(tunesmith("show", child, "--store", store.folder, "--json").stdout)
    assert facts["up"]["parents"][0]["id"] == parent
    assert tunesmith("show", "adapter-ffffff", "--store", store.folder).returncode == 2
    (store.folder / "ledger.db").unlink()
    for leftover in store.folder.glob("ledger.db-*"):
        leftover.unlink()
    rebuilt = tunesmith("show", "--rebuild", "--store", store.folder)
    assert "2 artifacts indexed again" in rebuilt.stderr and child in rebuilt.stdout


def test_alias_points_and_refuses_a_stale_move(made: tuple[Store, str, str]) -> None:
    store, parent, child = made
    where = ("--store", store.folder)
    assert tunesmith("alias", "bot@live", child, *where).returncode == 0
    assert json.loads(tunesmith("show", "bot@live", *where, "--json").stdout)["up"]["id"] == child
    stale = tunesmith("alias", "bot@live", parent, "--expect", parent, *where)
    assert stale.returncode == 3 and "nothing was moved" in stale.stderr


def test_verify_names_the_damaged_file_of_a_parent(made: tuple[Store, str, str]) -> None:
    store, parent, child = made
    assert tunesmith("verify", child, "--store", store.folder).returncode == 0
    for name in ("rows.jsonl", "manifest.json"):
        path = store.folder / "artifacts" / parent / name
        whole = path.read_bytes()
        path.write_bytes(bytes([whole[0] ^ 4]) + whole[1:])
        done = tunesmith("verify", child, "--store", store.folder)
        assert done.returncode == 3
        assert str(path) in done.stderr
        path.write_bytes(whole)
