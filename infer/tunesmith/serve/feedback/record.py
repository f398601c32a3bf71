"""One person's word on one answer, tied to its line in the request log."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import Engine

from tunesmith.serve.errors import ApiError
from tunesmith.serve.govern.archive import find_line
from tunesmith.serve.govern.database import feedback

_LONGEST = {"label": 64, "correction": 100_000, "comment": 10_000}


@dataclass(frozen=True)
class Word:
    """What is said; at least one of it."""

    score: float | None = None
    label: str | None = None
    correction: str | None = None
    comment: str | None = None


def read_word(body: dict[str, Any]) -> tuple[str, Word]:
    """The answer's id and what is said of it. Raises ApiError on anything else."""
    fields = ("score", *_LONGEST)
    if unknown := body.keys() - {"id", *fields}:
        raise _refused(f"unknown: {', '.join(sorted(unknown))}; there is id, {', '.join(fields)}")
    answer_id = body.get("id")
    if not isinstance(answer_id, str) or not 0 < len(answer_id) <= 128:
        raise _refused("id: give the id of the answer, such as chatcmpl-…")
    score = body.get("score")
    if score is not None:
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if not is_number or not math.isfinite(score) or not 0 <= score <= 1:
            raise _refused("score: a number from 0 (bad) to 1 (good)")
    for name, most in _LONGEST.items():
        text = body.get(name)
        if text is not None and (not isinstance(text, str) or not 0 < len(text) <= most):
            raise _refused(f"{name}: a text of at most {most:,} characters, and not an empty one")
    word = Word(**{name: body.get(name) for name in fields})
    if word == Word():
        raise _refused(f"say something of the answer: {', '.join(fields)}")
    return answer_id, word


def _refused(message: str) -> ApiError:
    return ApiError(400, message, "invalid_feedback")


def record(
    engine: Engine, folder: Path, answer_id: str, word: Word, key_id: str | None
) -> dict[str, Any] | None:
    """Keep it, in place of what the same key said before; fields that are not given stay.

    `key_id` may speak of its own answers alone; None of all. Returns None when the log has no such
    answer. Blocks, so it is for a thread.
    """
    line = find_line(engine, folder, answer_id, key_id)
    if line is None:
        return None
    given = {name: value for name, value in asdict(word).items() if value is not None}
    now_s = time.time()
    row = insert(feedback).values(
        request_seq=line["seq"], giver=key_id or "", at_s=now_s, **asdict(word)
    )
    with engine.begin() as db:
        db.execute(
            row.on_conflict_do_update(
                index_elements=["request_seq", "giver"], set_={"at_s": now_s, **given}
            )
        )
    return {
        "object": "feedback",
        "id": answer_id,
        "request_id": line["request_id"],
        "model": line["model"],
        "artifact": line["artifact"],
        "created": int(now_s),
        "is_exportable": line["has_payload"],
        **given,
    }


def read_words(engine: Engine) -> list[dict[str, Any]]:
    """All of it, oldest first."""
    query = sa.select(feedback).order_by(feedback.c.at_s, feedback.c.request_seq)
    with engine.connect() as db:
        return [dict(row) for row in db.execute(query).mappings()]
