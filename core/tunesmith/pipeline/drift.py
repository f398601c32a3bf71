"""Work that was interrupted and would not be continued, because the recipe has changed since.

What is made has an id that its recipe, inputs and parents decide. Changed, they would begin another
work from nothing and leave the hours of the first one behind without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tunesmith.config.errors import UserError
from tunesmith.ledger import Draft
from tunesmith.pipeline.stages import Stages
from tunesmith.terminal import log


def check_drift(
    stages: Stages,
    new: Draft,
    kind: str,
    progress: Callable[[Draft], str | None],
    *,
    discard: bool,
) -> None:
    """Raise UserError, saying what changed, when work of this name was interrupted and is not what
    the recipe now asks for; with `discard` drop it.

    `progress` says how far an attempt came, None where it is other work or has nothing to lose.
    """
    store = stages.store
    if store.find(new.id) or progress(new):
        return
    for old in store.interrupted(new.name):
        done = progress(old)
        if done is None:
            continue
        if discard:
            store.discard(old)
            log(f"dropped the interrupted {kind} {old.id}")
            continue
        changes = dict.fromkeys(_changes(stages, old, new))
        raise UserError(
            f"a {kind} of {new.name} was interrupted after {done} ({old.id}), and this has changed "
            "since:\n"
            + "".join(f"  {change}\n" for change in changes)
            + f"put it back to continue that {kind}, or add --discard to drop it and start anew"
        )


def _changes(stages: Stages, old: Draft, new: Draft) -> Iterator[str]:
    """What differs between two drafts, down to what their parents were made of."""
    before, after = _flat(old.section), _flat(new.section)
    # Another method brings and takes settings of its own, which say nothing more.
    compared = before.keys() | after.keys()
    if before.get("train.method") != after.get("train.method"):
        compared = before.keys() & after.keys()
    for key in sorted(compared - {"builtin"}):
        if before.get(key) != after.get(key):
            name = "Tunesmith's own revision" if key == "revision" else key
            yield f"{name}: {_text(before.get(key))} → {_text(after.get(key))}"
    for name in sorted(old.inputs.keys() | new.inputs.keys()):
        if old.inputs.get(name) != new.inputs.get(name):
            yield _input_change(stages, new.kind, name, name in old.inputs, name in new.inputs)
    known = {parent.id: (whose, parent) for whose, parent in _parents(stages)}
    for role in sorted(old.parents.keys() | new.parents.keys()):
        left, right = old.parents.get(role), new.parents.get(role)
        if left == right:
            continue
        found = stages.store.find(left) if left else None
        if found and right in known:
            whose, parent = known[right]
            yield from _changes(whose, Draft.of(found.manifest), parent)
        else:
            yield f"{role}: {_text(left)} → {_text(right)}"


def _input_change(stages: Stages, kind: str, name: str, was: bool, is_now: bool) -> str:
    recipe = stages.recipe
    verb = "changed" if was and is_now else "added" if is_now else "taken away"
    if name == "chat_template":
        where = f" ({recipe.model.chat_template})" if is_now else ""
        return f"model.chat_template: {verb}{where}"
    if kind == "dataset" and recipe.data:
        where = f" ({getattr(recipe.data, name)})" if is_now else ""
        return f"data.{name}: rows {verb}{where}"
    if kind == "batch" and recipe.batch:
        return f"batch.{name}: {verb} ({getattr(recipe.batch, name)})"
    return f"model.base: {name} {verb} ({recipe.model.base})"


def _parents(stages: Stages) -> Iterator[tuple[Stages, Draft]]:
    """Everything that the recipe makes of it, with the stages it belongs to."""
    if stages.recipe.data:
        yield stages, stages.dataset
    if stages.builds_base:
        yield stages.builtin_base, stages.base
        yield from _parents(stages.builtin_base)
    elif stages.recipe.model.base:
        yield stages, stages.base
    if stages.recipe.train:
        yield stages, stages.trained
        yield stages, stages.tuned
    for scheme in stages.schemes:
        yield stages, stages.quantized(scheme)


def _flat(section: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested sections as `train.lora.r` → value."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = json.loads(json.dumps(value))
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
