"""Why vLLM did not start, or died: the one line that matters, from an exception or from its log."""

from __future__ import annotations

import re
from pathlib import Path

from tunesmith.config.errors import ModelError, TunesmithError
from tunesmith.engine.spec import EngineSpec

# The process and the place that vLLM puts before its lines.
_PREFIX = re.compile(r"^(?:\([^)]*\)\s*)?(?:ERROR [^\]]*\]\s*)?")
_EXCEPTION = re.compile(
    r"^(?P<type>(?:\w+\.)*\w*(?:Error|Exception)|Fatal Python error): ?(?P<text>.*)$"
)
_SECOND_HAND = (
    "Engine core initialization failed", "WorkerProc initialization failed",
    "EngineCore encountered an issue",
)  # fmt: skip
# A model or a setting that vLLM will not take, as opposed to a failure on the way.
_REFUSALS = {
    "ValueError", "NotImplementedError", "ValidationError", "KeyError", "AttributeError",
    "AssertionError", "TypeError", "VLLMValidationError",
}  # fmt: skip
_LONGEST = 600


def start_failure(text: str, spec: EngineSpec, log_path: Path | None = None) -> TunesmithError:
    """The typed error for what an engine said when it did not start."""
    kind, cause = root_cause(text) or ("", "it gave no reason")
    where = f"; its log is {log_path}" if log_path else ""
    if kind.rpartition(".")[2] in _REFUSALS:
        return ModelError(
            f"vLLM does not take {spec.adapter or spec.model}: {cause}\n"
            f"see the engine section of the recipe and the model's config.json{where}"
        )
    return TunesmithError(f"vLLM failed on {spec.adapter or spec.model}: {kind}: {cause}{where}")


def death(text: str, spec: EngineSpec, log_path: Path) -> TunesmithError:
    """The error for an engine that had started and then ended, from what it left in its log."""
    kind, cause = root_cause(text) or ("", "")
    reason = f"{kind}: {cause}" if kind else "it was killed, or left no reason"
    return TunesmithError(f"vLLM died on {spec.adapter or spec.model}: {reason}; see {log_path}")


def root_cause(text: str) -> tuple[str, str] | None:
    """Type and message of the last exception that does not only point to another one."""
    lines = [_PREFIX.sub("", line) for line in text.splitlines()]
    found = None
    for index, line in enumerate(lines):
        match = _EXCEPTION.match(line)
        if match and not match["text"].startswith(_SECOND_HAND):
            found = match["type"], _message(match["text"], lines[index + 1 : index + 2])
    return found


def _message(first: str, following: list[str]) -> str:
    """Pydantic, and whoever ends on a colon, put the reason on the line after the headline."""
    reason = following[0].strip() if following else ""
    if reason and "validation error" in first:
        first = reason.partition(" [type=")[0].removeprefix("Value error, ")
    elif reason and first.endswith(":"):
        first = f"{first} {reason}"
    return first.strip()[:_LONGEST]
