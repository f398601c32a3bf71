"""What a person is shown of a data set is what the training gets."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.config.schema import Recipe
from tunesmith.data import make_dataset
from tunesmith.pipeline import Stages
from tunesmith.train import preview
from tunesmith.train.language import read_language
from tunesmith.train.tokenizer import TURN_END, learn_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of which only the tokenizer is there."""
    folder = tmp_path_factory.mktemp("base")
    learn_tokenizer(["def add(a, b): return a + b\n"] * 20, 600, 64).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return folder


@pytest.fixture
def make(tmp_path: Path, base: Path) -> Any:
    def stages(rows: list[Any], model: str = str(base), **data: Any) -> Stages:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        recipe = {
            "name": "test",
            "store": {"folder": tmp_path / "store"},
            "model": {"base": model},
            "data": {"train": str(path), "evaluation_fraction": 0.2, **data},
        }
        return Stages(Recipe.model_validate(recipe))

    return stages


def talk(at: int, answer: str = "return") -> dict[str, Any]:
    turns = [("user", f"add {at}?"), ("assistant", "def"), ("user", "and?"), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[1]["weight"] = 0  # type: ignore[assignment]
    return {"messages": messages}


def printed(result: dict[str, Any]) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(preview.show(result))
    return console.export_text()


def joined(sequence: dict[str, Any], *states: str) -> str:
    return "".join(span["text"] for span in sequence["spans"] if span["state"] in states)


def test_spans_are_the_conversation_with_what_is_learnt(make: Any, base: Path) -> None:
    stages = make([talk(at) for at in range(30)])
    result = preview.run(stages, 3)
    assert json.loads(json.dumps(result)) == result
    assert len(result["shown"]) == 3
    language = read_language(base, stages.recipe)
    rows = {
        row["id"]: row
        for row in map(json.loads, (Path(result["path"]) / "train.jsonl").open(encoding="utf-8"))
    }
    for shown in result["shown"]:
        (sequence,) = shown["sequences"]
        whole = language.template.render(rows[shown["id"]]["messages"])
        assert joined(sequence, "context", "learnt", "cut") == whole
        assert joined(sequence, "learnt") == f"return{TURN_END}"
        assert any(span["special"] and span["state"] == "context" for span in sequence["spans"])
    text = printed(result)
    assert f"⟦return{TURN_END}⟧" in text
    assert "supervised share" in text


def test_figures_are_those_of_the_training(make: Any, base: Path) -> None:
    rows = [talk(at, "return a + b\n" * (1 + at % 5)) for at in range(40)]
    rows[7]["messages"][3]["content"] = f"a {TURN_END} b"
    settings = {"max_length": 80, "max_error_rate": 0.1, "max_dropped_rate": 0.5}
    stages = make(rows, **settings)
    result = preview.run(stages, 1)
    language = read_language(base, stages.recipe)
    for side in ("train", "evaluation"):
        found = language.tokenise(make_dataset(stages), f"{side}.jsonl", stages.recipe.data)
        figures = result["tokens"][side]
        lengths = found.lengths()
        assert figures["sequences"] == len(found.rows) == len(lengths)
        assert figures["tokens"] == lengths.sum()
        assert figures["supervised_tokens"] == found.supervised().sum()
        assert (figures["truncated"], figures["rows"]) == (found.truncated, found.read)
        assert sum(part["sequences"] for part in figures["histogram"]) == len(lengths)
        for part in figures["histogram"]:
            inside = (lengths >= part["from"]) & (lengths <= part["to"])
            assert part["sequences"] == inside.sum()
    losses = [result["tokens"][side]["dropped"] for side in result["tokens"]]
    assert sum(loss["refused by the chat template"] for loss in losses) == 1
    assert result["tokens"]["train"]["truncated"] > 0


@pytest.mark.parametrize(
    ("truncation", "kept"), [("end", "context learnt"), ("start", "learnt"), ("drop", "")]
)
def test_what_is_cut_off_is_marked(make: Any, truncation: str, kept: str) -> None:
    rows = [talk(at, "return a + b\n" * (40 if at % 2 else 1)) for at in range(30)]
    stages = make(rows, max_length=90, truncation=truncation, max_dropped_rate=1.0)
    result = preview.run(stages, 100)
    long = [row["sequences"][0] for row in result["shown"] if row["sequences"][0]["tokens"] > 100]
    assert len(long) > 5
    for sequence in long:
        left = sequence["tokens"] - sequence["cut_tokens"]
        assert left == (0 if truncation == "drop" else 90)
        states = {span["state"] for span in sequence["spans"]} - {"cut"}
        assert states <= set(kept.split())
    assert "✂" in printed(result)


def test_both_answers_of_a_preference_are_shown(make: Any) -> None:
    rows = [{"prompt": f"{at}?", "chosen": "return", "rejected": "def"} for at in range(20)]
    result = preview.run(make(rows, format="preference"), 1)
    chosen, rejected = result["shown"][0]["sequences"]
    assert (chosen["name"], rejected["name"]) == ("chosen", "rejected")
    assert joined(chosen, "learnt") == f"return{TURN_END}"
    assert joined(rejected, "learnt") == f"def{TURN_END}"
    assert result["tokens"]["train"]["sequences"] == 2 * result["train_rows"]


def test_texts_are_learnt_whole(make: Any) -> None:
    result = preview.run(make([{"text": f"add {at}"} for at in range(20)], format="text"), 2)
    for row in result["shown"]:
        (sequence,) = row["sequences"]
        assert joined(sequence, "context", "learnt").endswith(TURN_END)
        assert sequence["learnt_tokens"] == sequence["tokens"] - 1


def test_without_the_base_there_are_counts(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = preview.run(make([talk(at) for at in range(20)], model="./nowhere"), 2)
    assert result["tokens"] is None
    assert "no such folder: ./nowhere" in result["no_tokens_because"]
    assert result["train_rows"] + result["evaluation_rows"] == 20
    assert "training rows" in printed(result)
    assert "no such folder: ./nowhere" in capsys.readouterr().err


def test_without_rows_nothing_is_tokenised(make: Any, tmp_path: Path) -> None:
    result = preview.run(make([talk(at) for at in range(20)]), 0)
    assert "tokens" not in result
    assert not (tmp_path / "store" / "cache").exists()
