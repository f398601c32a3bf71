"""The dataset artifact, and the message for each way in which data can be bad."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.config.errors import DataError, UserError
from tunesmith.data import command, make_dataset, read_rows
from tunesmith.data.dataset import ERRORS_FILE, EVALUATION_FILE, TRAIN_FILE
from tunesmith.ledger import Artifact


def rows_of(artifact: Artifact) -> tuple[list[Any], list[Any]]:
    train, evaluation = (
        list(read_rows(artifact.root / name)) for name in (TRAIN_FILE, EVALUATION_FILE)
    )
    return train, evaluation


def test_rows_are_split_counted_and_numbered(
    make_stages: Any, write_lines: Any, conversations: Any
) -> None:
    rows = conversations(200)
    path = write_lines(*rows, rows[0])
    artifact = make_dataset(make_stages(path, evaluation_fraction=0.1))
    train, evaluation = rows_of(artifact)
    metrics = artifact.manifest.metrics
    assert len(train) + len(evaluation) == 201
    assert len({row["id"] for row in train + evaluation}) == 201
    assert [metrics["train_rows"], metrics["evaluation_rows"]] == [len(train), len(evaluation)]
    sides = (train, evaluation)
    repeated = [sum(row["messages"] == rows[0]["messages"] for row in side) for side in sides]
    assert sorted(repeated) == [0, 2]
    assert metrics["duplicate_rows"] == (repeated[0] == 2)
    assert metrics["leaked_rows"] == metrics["leaked_prompts"] == 0
    assert metrics["train_characters"] == sum(
        len(turn["content"]) for row in train for turn in row["messages"]
    )


def test_the_same_data_is_made_once_and_a_changed_byte_makes_it_anew(
    make_stages: Any, write_lines: Any, conversations: Any
) -> None:
    rows = conversations(20)
    first = make_dataset(make_stages(write_lines(*rows)))
    assert make_dataset(make_stages(write_lines(*rows))).manifest == first.manifest
    rows[-1]["messages"][1]["content"] += "!"
    assert make_dataset(make_stages(write_lines(*rows))).id != first.id


def test_max_rows_is_of_training_rows_and_by_seed(
    make_stages: Any, write_lines: Any, conversations: Any
) -> None:
    path = write_lines(*conversations(100))
    chosen = [
        make_dataset(make_stages(path, seed=seed, max_rows=10, evaluation_fraction=0.2))
        for seed in (1, 2)
    ]
    (first, held_out), (second, held_out_too) = map(rows_of, chosen)
    assert len(first) == len(second) == 10
    assert first != second
    assert held_out == held_out_too
    assert chosen[0].manifest.metrics["unused_rows"] == 100 - len(held_out) - 10


def test_leakage_into_given_held_out_rows_is_counted(
    make_stages: Any, write_lines: Any, conversations: Any
) -> None:
    train, other = conversations(10), conversations(10)
    other[3]["messages"][1]["content"] = "No."
    stages = make_stages(
        write_lines(*train), evaluation=str(write_lines(*other[:4], name="held_out.jsonl"))
    )
    artifact = make_dataset(stages)
    assert artifact.manifest.metrics["train_rows"] == 10
    assert artifact.manifest.metrics["evaluation_rows"] == 4
    assert artifact.manifest.metrics["leaked_rows"] == 3
    assert artifact.manifest.metrics["leaked_prompts"] == 4


def test_bad_rows_within_the_allowed_rate_are_listed_and_left_out(
    make_stages: Any, write_lines: Any, conversations: Any
) -> None:
    path = write_lines(*conversations(18), "{broken", {"messages": []})
    artifact = make_dataset(make_stages(path, max_error_rate=0.1))
    metrics = artifact.manifest.metrics
    assert metrics["train_rows"] + metrics["evaluation_rows"] == 18
    assert metrics["dropped"] == {"invalid_json": 1, "no_assistant_turn": 1}
    listed = list(read_rows(artifact.root / ERRORS_FILE))
    assert [(row["source"], row["line"], row["error"]) for row in listed] == [
        (str(path), 19, "invalid_json"),
        (str(path), 20, "no_assistant_turn"),
    ]
    assert listed[0]["detail"].startswith("invalid JSON")


GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
UNANSWERED = '{"messages": [{"role": "user", "content": "a"}]}\n'


@pytest.mark.parametrize(
    ("name", "content", "data", "said"),
    [
        ("none.jsonl", None, {}, ["none.jsonl: no such file"]),
        ("empty.jsonl", "", {}, ["empty.jsonl: no rows; give"]),
        ("blank.jsonl", "\n\n", {}, ["blank.jsonl: no rows"]),
        ("empty.json", "[]", {}, ["empty.json: no rows"]),
        ("header.csv", "prompt,completion\n", {}, ["header.csv: no rows"]),
        (
            "json.jsonl",
            GOOD + "{'a': 1}\n" + GOOD,
            {},
            ["json.jsonl:2: invalid JSON", "1 of 3 rows", "or raise data.max_error_rate"],
        ),
        (
            "many.jsonl",
            GOOD + "[1]\n" * 9,
            {"max_error_rate": 0.5},
            ["many.jsonl:6: a row is", "and 4 more, all listed in", "errors.jsonl", "(0.5)"],
        ),
        (
            "column.jsonl",
            '{"instruction": "a", "output": "b"}\n',
            {"max_error_rate": 1.0},
            ["needs the column messages", "there are instruction, output", "data.format: alpaca"],
        ),
        (
            "columns.csv",
            "question,answer\na,b\n",
            {"format": "prompt_completion"},
            ["needs the columns prompt, completion", "there are answer, question", "rename them"],
        ),
        ("turn.jsonl", GOOD + UNANSWERED, {}, ["turn.jsonl:2: no assistant turn"]),
        ("all.jsonl", UNANSWERED * 2, {"max_error_rate": 1.0}, ["none of its 2 rows can be used"]),
        ("same.jsonl", GOOD * 5, {}, ["5 usable rows are all the same", "data.evaluation"]),
    ],
)
def test_bad_data_is_refused_with_its_place_and_the_way_out(
    name: str,
    content: str | None,
    data: dict[str, Any],
    said: list[str],
    tmp_path: Path,
    make_stages: Any,
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        make_dataset(make_stages(path, **data))
    assert raised.value.exit_code == 2
    for part in said:
        assert part in str(raised.value)


def test_all_faults_of_a_refused_file_are_kept(
    make_stages: Any, write_lines: Any, tmp_path: Path
) -> None:
    stages = make_stages(write_lines(*["{"] * 8))
    with pytest.raises(DataError) as raised:
        make_dataset(stages)
    (listing,) = (tmp_path / "store").rglob(ERRORS_FILE)
    assert str(listing) in str(raised.value)
    assert len(listing.read_text(encoding="utf-8").splitlines()) == 8
    assert stages.store.find(stages.dataset.id) is None


def test_a_recipe_without_data_is_refused(make_stages: Any) -> None:
    stages = make_stages("unused.jsonl")
    stages.recipe = stages.recipe.model_copy(update={"data": None})
    with pytest.raises(UserError, match=r"recipe\.yaml: this needs a data section"):
        make_dataset(stages)


def test_the_command_reports_and_shows_the_counts(
    make_stages: Any, write_lines: Any, conversations: Any
) -> None:
    path = write_lines(*conversations(19), "{")
    result = command.run(make_stages(path, max_error_rate=0.1))
    assert json.loads(json.dumps(result)) == result
    assert result["id"].startswith("dataset-")
    console = Console(width=120, record=True)
    console.print(command.show(result))
    shown = console.export_text()
    assert f"│ {result['train_rows']:>5} │".replace(" ", "") in shown.replace(" ", "")
    assert "dropped: invalid_json" in shown
    assert result["path"] in shown.replace("\n", "")


def test_builtin_data_needs_no_file_and_mixes_with_one(
    make_stages: Any, write_lines: Any, conversations: Any
) -> None:
    artifact = make_dataset(
        make_stages(write_lines(*conversations(5)), evaluation="builtin/stdlib")
    )
    metrics = artifact.manifest.metrics
    assert metrics["train_rows"] == 5
    assert 100 < metrics["evaluation_rows"] < 1_000


def test_importing_needs_no_torch() -> None:
    code = "import sys, tunesmith.data.command; print({'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
