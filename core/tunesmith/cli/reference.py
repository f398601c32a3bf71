"""Writes docs/recipe.md from the schema: `python -m tunesmith.cli.reference > docs/recipe.md`."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tunesmith.config.load import item_of, named_of, section_of
from tunesmith.config.schema import Recipe

_HEAD = """\
# The recipe, key by key

One YAML file. Unknown keys are errors. `tunesmith check RECIPE` validates it, `tunesmith schema`
prints this page's content as JSON Schema, and `KEY=VALUE` after a command overrides one value:
`tunesmith train recipe.yaml train.learning_rate=1e-4`.
"""


def recipe_reference() -> str:
    """The page, as Markdown."""
    return "\n".join([_HEAD, *_section(Recipe, "")])


def _section(model: type[BaseModel], path: str) -> Iterator[str]:
    yield f"## {path or 'Top level'}\n"
    yield f"{' '.join((model.__doc__ or '').split())}\n"
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        where = f"{path}.{name}" if path else name
        if section:
            inner.append((where, section))
        elif item := item_of(field.annotation):
            inner.append((f"{where}[]", item))
        elif named := named_of(field.annotation):
            inner.append((f"{where}.NAME", named))
        meaning = " ".join((field.description or "").split())
        yield f"| `{name}` | {_values(field, section)} | {_default(field)} | {meaning} |"
    yield ""
    for inner_path, section in inner:
        yield from _section(section, inner_path)


def _values(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if section:
        return "section"
    limits = ", ".join(text for item in field.metadata if (text := _limit(item)))
    kind = _type_name(field.annotation)
    return f"{kind}, {limits}" if limits else kind


def _limit(item: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return " ".join(
        f"{sign} {getattr(item, name)}"
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    )


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"{_type_name(arguments[1])} by name"
    if origin is typing.Annotated:
        limits = ", ".join(text for item in arguments[1:] if (text := _limit(item)))
        return f"{_type_name(arguments[0])} {limits}".strip()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "sections"
    if arguments:
        return " or ".join(_type_name(arm) for arm in arguments)
    names = {int: "integer", float: "number", str: "text", bool: "true, false", Path: "path"}
    return names.get(annotation, "null")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return (
        f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"
    )


if __name__ == "__main__":
    print(recipe_reference(), end="")
