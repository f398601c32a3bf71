"""Several sources, each row of which is used as often as its weight says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config import RecipeError, load_recipe
from tunesmith.config.errors import DataError
from tunesmith.data import make_dataset, read_rows
from tunesmith.ledger import Artifact


def used(artifact: Artifact) -> Counter[str]:
    """How often each question is asked."""
    rows = read_rows(artifact.root / "train.jsonl")
    return Counter(row["messages"][0]["content"] for row in rows)


@pytest.fixture
def sources(write_lines: Any) -> dict[str, dict[str, str]]:
    """Two files of forty rows in different shapes, and held-out rows."""
    talks = [
        {"messages": [{"role": "user", "content": f"a{at}"}, {"role": "assistant", "content": "b"}]}
        for at in range(40)
    ]
    tasks = [{"instruction": f"c{at}", "output": "d"} for at in range(40)]
    return {
        "talks": {"source": str(write_lines(*talks, name="talks.jsonl"))},
        "tasks": {
            "source": str(write_lines(*tasks, name="tasks.jsonl")),
            "format": "alpaca",
        },
    }


def test_weights_say_how_often_rows_are_used(make_stages: Any, sources: Any) -> None:
    train = [{**sources["talks"], "weight": 2.5}, {**sources["tasks"], "weight": 0.25}]

    def make(seed: int) -> Artifact:
        stages = make_stages(train, seed=seed, evaluation_fraction=0.2)
        return make_dataset(stages)

    artifact = make(1)
    metrics = artifact.manifest.metrics
    talks, tasks = metrics["sources"]
    asked = used(artifact)
    of_talks = Counter(count for name, count in asked.items() if name[0] == "a")
    rows = 40 - talks["evaluation_rows"]
    assert of_talks == {2: rows - round(rows / 2), 3: round(rows / 2)}
    of_tasks = [count for name, count in asked.items() if name[0] == "c"]
    assert of_tasks == [1] * round((40 - tasks["evaluation_rows"]) / 4)
    assert talks["train_rows"] == sum(n * count for n, count in of_talks.items())
    assert metrics["train_rows"] == talks["train_rows"] + tasks["train_rows"] == asked.total()
    assert metrics["evaluation_rows"] == talks["evaluation_rows"] + tasks["evaluation_rows"] > 0
    # Rows that stand there several times by their weight are no duplicates and leak nowhere.
    assert (metrics["duplicate_rows"], metrics["leaked_rows"]) == (0, 0)
    held_out = read_rows(artifact.root / "evaluation.jsonl")
    assert not {row["messages"][0]["content"] for row in held_out} & set(asked)
    ids = [row["id"] for row in read_rows(artifact.root / "train.jsonl")]
    assert len(set(ids)) == len(ids)

    assert make(1).id == artifact.id
    assert used(make(2)) != asked
    train[0]["weight"] = 2.0
    assert make(1).id != artifact.id


def test_max_rows_keeps_the_proportions(make_stages: Any, write_lines: Any) -> None:
    """A row that its weight chose must not be likelier to be chosen again."""
    train = []
    for name, weight in (("a", 0.25), ("b", 1.0), ("c", 2.0)):
        rows = [{"text": f"{name}{at}"} for at in range(800)]
        train.append({"source": str(write_lines(*rows, name=f"{name}.jsonl")), "weight": weight})
    stages = make_stages(train, format="text", max_rows=1000, evaluation_fraction=0.01)
    used = [source["train_rows"] for source in make_dataset(stages).manifest.metrics["sources"]]
    assert sum(used) == 1000
    for found, expected in zip(used, (77, 308, 615), strict=True):
        assert abs(found - expected) < 45


def test_one_source_in_a_list_gives_the_rows_of_a_plain_one(make_stages: Any, sources: Any) -> None:
    plain = make_dataset(make_stages(sources["talks"]["source"]))
    listed = make_dataset(make_stages([sources["talks"]]))
    for name in ("train.jsonl", "evaluation.jsonl"):
        assert (plain.root / name).read_bytes() == (listed.root / name).read_bytes()


def test_builtin_rows_mix_with_others_and_hold_out_their_own(
    make_stages: Any, sources: Any
) -> None:
    train = [sources["talks"], {"source": "builtin/stdlib", "weight": 0.1}]
    artifact = make_dataset(make_stages(train))
    talks, builtin, reserve = artifact.manifest.metrics["sources"]
    assert talks["evaluation_rows"] > 0
    assert talks["train_rows"] + talks["evaluation_rows"] == 40
    assert builtin["train_rows"] == round(builtin["usable_rows"] / 10)
    assert builtin["evaluation_rows"] == 0 < reserve["evaluation_rows"]
    assert artifact.manifest.metrics["leaked_rows"] == 0


def test_a_weight_that_leaves_nothing_is_refused(make_stages: Any, sources: Any) -> None:
    train = [sources["talks"], {**sources["tasks"], "weight": 0.001}]
    with pytest.raises(DataError, match=r"tasks.jsonl: weight 0.001 of its \d+ training rows"):
        make_dataset(make_stages(train))


def test_the_source_of_a_bad_row_is_named(make_stages: Any, sources: Any) -> None:
    train = [sources["talks"], {"source": sources["tasks"]["source"], "format": "sharegpt"}]
    with pytest.raises(DataError, match=r"tasks.jsonl: data.format: sharegpt needs the column"):
        make_dataset(make_stages(train))


def test_formats_that_are_learnt_differently_do_not_mix(make_stages: Any, sources: Any) -> None:
    train = [sources["talks"], {**sources["tasks"], "format": "text"}]
    with pytest.raises(ValueError, match="text cannot be mixed with data.format: messages"):
        make_stages(train)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            "    - {source: a.jsonl}\n    - source: b.jsonl\n      wieght: 2\n",
            'recipe.yaml:7: data.train.1.wieght: unknown key; did you mean "weight"?',
        ),
        (
            "    - {source: a.jsonl, weight: 0}\n",
            "recipe.yaml:5: data.train.0.weight: input should be greater than 0, got 0",
        ),
        ("    - {weight: 2}\n", "recipe.yaml:5: data.train.0.source: required, and not given"),
        ("    []\n", "recipe.yaml:3: data: train: a list of sources has at least one"),
        ("    3\n", "recipe.yaml:4: data.train: input should be a valid string, got 3"),
    ],
)
def test_a_fault_in_a_list_has_its_line(tmp_path: Path, lines: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: test\nmodel: {{base: x/y}}\ndata:\n  train:\n{lines}", encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert said in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_what_is_learnt_fits_the_format(make_stages: Any) -> None:
    make_stages("rows.jsonl", format="preference", learn="last")
    with pytest.raises(ValueError, match="learn: last is of conversations"):
        make_stages("rows.jsonl", format="text", learn="last")


def test_what_is_learnt_gives_another_data_set(make_stages: Any, write_lines: Any) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write_lines(
        *[{"messages": [*messages[:-1], {**messages[-1], "content": str(at)}]} for at in range(9)]
    )
    every, last = (make_dataset(make_stages(path, learn=learn)) for learn in ("all", "last"))
    assert every.id != last.id
    (row, *_), (other, *_) = (list(read_rows(one.root / "train.jsonl")) for one in (every, last))
    assert [turn.get("weight") for turn in row["messages"]] == [None] * 4
    assert [turn.get("weight") for turn in other["messages"]] == [None, 0, None, None]
