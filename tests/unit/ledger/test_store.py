"""Artifacts: same work, same id; whole or absent; every byte accounted for."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tunesmith.config import GateError, Recipe, TunesmithError, UnknownArtifactError
from tunesmith.ledger import Artifact, Draft, Index, Store, hash_file

RECIPE = Recipe.model_validate(
    {"name": "bot", "model": {"base": "some/model"}, "price": {"gpu_hour_usd": 3600.0}}
)


def draft(seed: int = 0, **parents: str) -> Draft:
    return Draft("dataset", "data", "bot", {"seed": seed}, {"rows": "ab"}, parents)


def make(store: Store, what: Draft, text: str = "hello") -> Artifact:
    with store.write(what, RECIPE) as work:
        (work.out / "deep").mkdir()
        (work.out / "deep" / "rows.jsonl").write_text(text)
        work.metrics["rows"] = 1
    found = store.find(what.id)
    assert found is not None
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_the_id_depends_on_everything_that_decides_the_result() -> None:
    base = draft()
    assert base.id == draft().id
    others = [
        draft(1),
        draft(base="base-1"),
        Draft("eval", "data", "bot", base.section, base.inputs),
        Draft("dataset", "data", "bot", base.section, {"rows": "ac"}),
    ]
    assert len({base.id, *(other.id for other in others)}) == 5
    assert Draft("dataset", "other label", "other name", base.section, base.inputs).id == base.id
    assert draft(a="x", b="y").id == draft(b="y", a="x").id


def test_a_finished_artifact_is_found_with_its_facts(store: Store) -> None:
    artifact = make(store, draft())
    manifest = artifact.manifest
    assert set(manifest.files) == {"deep/rows.jsonl", "recipe.resolved.yaml"}
    assert manifest.files["deep/rows.jsonl"].sha256 == hash_file(
        artifact.root / "deep" / "rows.jsonl"
    )
    assert manifest.cost.usd is not None and manifest.cost.usd > 0
    assert manifest.environment["python"]
    assert not store.in_progress(draft())
    assert store.get(artifact.id[:12]).id == artifact.id
    assert store.faults(artifact) == []


def test_a_failed_attempt_leaves_no_artifact_and_keeps_its_scratch(store: Store) -> None:
    with pytest.raises(RuntimeError, match="boom"), store.write(draft(), RECIPE) as work:
        (work.out / "half").write_text("half")
        (work.scratch / "kept").write_text("kept")
        raise RuntimeError("boom")
    assert store.find(draft().id) is None
    assert store.in_progress(draft())
    with store.write(draft(), RECIPE) as work:
        assert (work.scratch / "kept").read_text() == "kept"
        assert not (work.out / "half").exists()
        (work.out / "whole").write_text("whole")
    assert store.find(draft().id) is not None


WRITER = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from tunesmith.config import Recipe
from tunesmith.ledger import Draft, Store
recipe = Recipe.model_validate({{"name": "bot", "model": {{"base": "some/model"}}}})
store = Store(Path({folder!r}))
draft = Draft("dataset", "data", "bot", {{"seed": 9}})
with store.write(draft, recipe) as work:
    for number in range(200):
        (work.out / f"part-{{number}}").write_bytes(b"x" * 10_000)
        if number == 20:
            print("started", flush=True)
"""


def test_kill_9_at_any_moment_leaves_all_or_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    code = WRITER.format(path=sys.path, folder=str(folder))
    random_ = random.Random(5)
    whole = 0
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "started\n"
            try:
                writer.wait(random_.uniform(0.0, 0.08))
            except subprocess.TimeoutExpired:
                os.kill(writer.pid, signal.SIGKILL)
        store = Store(folder)
        found = list((folder / "artifacts").iterdir())
        for artifact in found:
            assert store.faults(Artifact.read(artifact)) == []
            assert len(Artifact.read(artifact).manifest.files) == 201
            whole += 1
        if found:
            break
    if not whole:
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        assert len(list((folder / "artifacts").iterdir())) == 1


def test_two_writers_of_the_same_artifact_do_not_meet(store: Store) -> None:
    with (
        store.write(draft(), RECIPE) as work,
        pytest.raises(TunesmithError, match="another process is making"),
        store.write(draft(), RECIPE),
    ):
        raise AssertionError("the second writer was let in")
    assert work.draft == draft()


def test_every_flipped_byte_is_found_and_its_file_named(store: Store) -> None:
    artifact = make(store, draft())
    for name in ("deep/rows.jsonl", "recipe.resolved.yaml", "manifest.json"):
        path = artifact.folder / name
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 60)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            faults = store.verify(artifact.id)[1]
            assert faults and str(path) in faults[0], (name, at)
        path.write_bytes(whole)
    assert store.verify(artifact.id)[1] == []
    (artifact.folder / "extra").write_text("new")
    assert "not in the manifest" in store.faults(artifact)[0]
    (artifact.folder / "deep" / "rows.jsonl").unlink()
    assert "missing" in store.faults(artifact)[0]


def test_lineage_and_rebuild(store: Store) -> None:
    parent = make(store, draft(1))
    child = make(store, draft(2, data=parent.id))
    grandchild = make(store, draft(3, model=child.id, data=parent.id))
    assert [a.id for a in store.ancestors(grandchild)] == [child.id, parent.id]
    assert {child_id for _, child_id in store.index.children(parent.id)} == {
        child.id,
        grandchild.id,
    }
    before = store.index.all()
    assert [row.version for row in before] == [1, 2, 3]
    store.index.close()
    for leftover in store.folder.glob("ledger.db*"):
        leftover.unlink()
    again = Store(store.folder)
    assert again.index.all() == []
    assert again.rebuild() == 3
    assert again.index.all() == before


def test_aliases_move_only_from_where_they_were_seen(store: Store) -> None:
    one, two = make(store, draft(1)), make(store, draft(2))
    index = store.index
    index.set_alias("bot", "live", one.id, expected=None)
    with pytest.raises(GateError, match="exists already"):
        index.set_alias("bot", "live", two.id, expected=None)
    with pytest.raises(GateError, match="is not at"):
        index.set_alias("bot", "live", two.id, expected=two.id)
    index.set_alias("bot", "live", two.id, expected=one.id)
    assert store.get("bot@live").id == two.id
    assert [move[:2] for move in index.alias_history("bot", "live")] == [
        (None, one.id),
        (one.id, two.id),
    ]
    with pytest.raises(UnknownArtifactError, match="no alias"):
        store.get("bot@absent")


def test_of_many_that_move_an_alias_one_wins(store: Store) -> None:
    made = [make(store, draft(seed)) for seed in range(9)]
    store.index.set_alias("bot", "live", made[0].id, expected=None)

    def move(target: Artifact) -> bool:
        index = Index(f"sqlite:///{store.folder / 'ledger.db'}")
        try:
            index.set_alias("bot", "live", target.id, expected=made[0].id)
            return True
        except GateError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(move, made[1:])) == 1
    assert len(store.index.alias_history("bot", "live")) == 2


def test_an_input_is_hashed_again_when_it_changes(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": 1}))
    old = store.digest(path)
    os.utime(path, (1, 1))
    assert store.digest(path) == old
    path.write_text(json.dumps({"a": 2}))
    os.utime(path, (1, 1))
    assert store.digest(path) != old


OPEN_AT_ONCE = """
import sys, time
from tunesmith.ledger import Index

for at, url in enumerate(sys.argv[2:]):
    time.sleep(max(0.0, float(sys.argv[1]) + at - time.time()))
    Index(url).all()
"""


def test_many_may_open_a_new_ledger_at_once(tmp_path: Path) -> None:
    """Each rank of a training does, and a table that is there for one is new to another."""
    urls = [f"sqlite:///{tmp_path / f'{attempt}.db'}" for attempt in range(4)]
    start = str(time.time() + 15)
    ranks = [
        subprocess.Popen([sys.executable, "-c", OPEN_AT_ONCE, start, *urls], stderr=-1)
        for _ in range(6)
    ]
    assert [rank.communicate()[1] for rank in ranks] == [b""] * len(ranks)
