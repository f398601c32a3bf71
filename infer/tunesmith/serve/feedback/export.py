"""`tunesmith feedback export`: a data set of what people corrected, liked and preferred."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from tunesmith.config import DataError, UserError
from tunesmith.ledger import Artifact, Draft, Store
from tunesmith.pipeline import Stages
from tunesmith.serve.feedback.conversations import (
    Message,
    NotUsableError,
    read_answer,
    read_prompt,
)
from tunesmith.serve.feedback.record import read_words
from tunesmith.serve.govern.archive import read_lines
from tunesmith.serve.govern.database import open_gateway
from tunesmith.terminal import make_table

Kind = Literal["messages", "preference"]
ROWS, PROVENANCE = "rows.jsonl", "provenance.jsonl"
_REVISION = 1
_HELD_OUT = "in an evaluation set"


def run(stages: Stages, *, kind: str = "messages", min_score: float = 0.5) -> dict[str, Any]:
    """Make the artifact, or find it. Raises UserError where there is nothing to make it of."""
    if kind not in ("messages", "preference"):
        raise UserError(f"--kind {kind}: there is messages and preference")
    store = stages.store
    rated, left_out = _rated(store)
    if kind == "messages":
        rows = list(_liked(rated, min_score, left_out))
    else:
        rows = list(_preferred(rated, left_out))
    held_out = _held_out(store)
    kept = [one for one in rows if _question(one[1]["prompt"]) not in held_out]
    left_out[_HELD_OUT] += len(rows) - len(kept)
    left_out = +left_out
    if not kept:
        raise DataError(_nothing(left_out))
    draft = _draft(stages, kind, min_score, kept)
    found = store.find(draft.id)
    if found is None:
        with store.write(draft, stages.recipe) as work:
            for name, at in ((ROWS, 0), (PROVENANCE, 2)):
                text = "".join(json.dumps(row[at], ensure_ascii=False) + "\n" for row in kept)
                (work.out / name).write_text(text, encoding="utf-8")
            work.metrics |= {"rows": len(kept), "left_out": dict(left_out)}
        found = store.get(draft.id)
    return {
        "id": found.id,
        "kind": kind,
        "rows": len(kept),
        "left_out": dict(left_out),
        "file": str(found.root / ROWS),
    }


def show(result: dict[str, Any]) -> Any:
    """What became of the feedback."""
    rows = [
        ("rows", f"{result['rows']:,}"),
        *((f"left out: {reason}", f"{count:,}") for reason, count in result["left_out"].items()),
        ("data.train", result["file"]),
        ("data.format", result["kind"]),
    ]
    return make_table("Feedback", (result["id"], ""), rows)


Rated = dict[str, Any]
"""`prompt`, `tools`, `answer` (or why there is none), `words` and the `line` of the log."""

Made = tuple[dict[str, Any], Rated, dict[str, Any]]
"""A training row, what it was made of, and where that came from."""


def _rated(store: Store) -> tuple[list[Rated], Counter[str]]:
    """Every answer that somebody said something of."""
    engine = open_gateway(store.folder)
    words: dict[int, list[dict[str, Any]]] = {}
    for word in read_words(engine):
        words.setdefault(word["request_seq"], []).append(word)
    if not words:
        raise DataError(
            f"{store.folder}: no feedback yet; clients send it to POST /v1/feedback, and the page "
            "/ui has buttons for it"
        )
    lines = read_lines(engine, store.folder / "serve", set(words))
    if all(line["response_body"] is None for line in lines):
        raise UserError(
            "serve.log.payload is off, so nothing was kept of what the feedback is about; set it "
            "to true, serve, and ask people again"
        )
    found, left_out = [], Counter[str]()
    left_out["no line in the log"] = len(words) - len(lines)
    for line in lines:
        try:
            prompt, tools = read_prompt(line["path"], line["request_body"])
        except NotUsableError as error:
            left_out[str(error)] += 1
            continue
        rated: Rated = {"prompt": prompt, "tools": tools, "words": words[line["seq"]], "line": line}
        try:
            rated["answer"] = read_answer(line["path"], line["response_body"])
        except NotUsableError as error:
            rated["answer"], rated["fault"] = None, str(error)
        found.append(rated)
    return found, left_out


def _liked(rated: Sequence[Rated], min_score: float, left_out: Counter[str]) -> Iterator[Made]:
    """Corrections, and answers that scored well."""
    for one in rated:
        correction, score = _newest(one, "correction"), _newest(one, "score")
        if correction:
            answer: Message = {"role": "assistant", "content": correction}
        elif score is None or score < min_score:
            left_out["no correction, and no good score"] += 1
            continue
        elif one["answer"] is None:
            left_out[one["fault"]] += 1
            continue
        else:
            answer = one["answer"]
        row = {"messages": [*one["prompt"], answer]}
        yield _with_tools(row, one), one, _provenance(one, bool(correction))


def _preferred(rated: Sequence[Rated], left_out: Counter[str]) -> Iterator[Made]:
    """A correction before the answer that it corrects, and a better before a worse answer to the
    same prompt."""
    by_prompt: dict[str, list[Rated]] = {}
    for one in rated:
        if one["answer"] is None:
            left_out[one["fault"]] += 1
            continue
        by_prompt.setdefault(json.dumps([one["prompt"], one["tools"]]), []).append(one)
        correction = _newest(one, "correction")
        if correction and correction != one["answer"]["content"]:
            better = [{"role": "assistant", "content": correction}]
            row = {"prompt": one["prompt"], "chosen": better, "rejected": [one["answer"]]}
            yield _with_tools(row, one), one, _provenance(one, True)
    for group in by_prompt.values():
        scored = [one for one in group if _newest(one, "score") is not None]
        scored.sort(key=lambda one: _newest(one, "score"))
        if not scored or _newest(scored[0], "score") == _newest(scored[-1], "score"):
            left_out["nothing better or worse to the same prompt"] += sum(
                _newest(one, "correction") is None for one in group
            )
            continue
        worse, better_one = scored[0], scored[-1]
        if worse["answer"] == better_one["answer"]:
            left_out["equal answers"] += 1
            continue
        row = {
            "prompt": worse["prompt"],
            "chosen": [better_one["answer"]],
            "rejected": [worse["answer"]],
        }
        source = _provenance(better_one, False) | {"rejected": _provenance(worse, False)}
        yield _with_tools(row, worse), worse, source


def _with_tools(row: dict[str, Any], one: Rated) -> dict[str, Any]:
    return row | ({"tools": one["tools"]} if one["tools"] else {})


def _newest(one: Rated, name: str) -> Any:
    """The last word on it."""
    said = [word[name] for word in one["words"] if word[name] is not None]
    return said[-1] if said else None


def _provenance(one: Rated, is_correction: bool) -> dict[str, Any]:
    line = one["line"]
    names = ("seq", "request_id", "response_id", "at_s", "key_id", "model", "artifact")
    return {
        **{name: line[name] for name in names},
        **{name: line.get(name) for name in ("route", "arm", "version")},
        "is_correction": is_correction,
        "feedback": [
            {name: word[name] for name in ("giver", "at_s", "score", "label", "comment")}
            for word in one["words"]
        ],
    }


def _draft(stages: Stages, kind: str, min_score: float, rows: Sequence[Made]) -> Draft:
    digest = hashlib.sha256()
    for row, _, source in rows:
        digest.update(json.dumps([row, source], sort_keys=True).encode())
    answered = {one["line"]["artifact"] for _, one, _ in rows}
    made = sorted(name for name in answered if name and stages.store.find(name))
    return Draft(
        kind="dataset",
        label=f"feedback {kind}",
        name=stages.recipe.name,
        section={"feedback": {"kind": kind, "min_score": min_score}, "revision": _REVISION},
        inputs={"rows": digest.hexdigest()},
        parents={f"answered.{at}": name for at, name in enumerate(made)},
    )


def _held_out(store: Store) -> set[str]:
    """The questions of every evaluation set of the store."""
    found = set()
    for folder in sorted((store.folder / "artifacts").glob("dataset-*")):
        try:
            path = Artifact.read(folder).root / "evaluation.jsonl"
        except (OSError, ValueError):
            continue
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                for line in file:
                    messages = json.loads(line).get("messages") or []
                    answers = [at for at, one in enumerate(messages) if one["role"] == "assistant"]
                    found |= {_question(messages[:at]) for at in answers}
    return found


def _question(prompt: Sequence[Message]) -> str:
    """A prompt without what comes from the system, and without regard to spaces: the same question
    under other instructions would still have been learnt."""
    said = [(one["role"], " ".join(str(one.get("content") or "").split())) for one in prompt]
    return json.dumps([one for one in said if one[0] != "system"])


def _nothing(left_out: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    return f"the feedback makes no row: {reasons}"
