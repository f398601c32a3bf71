"""From a YAML file and `key=value` overrides to a `Recipe`, with every fault at its own line."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunesmith.config.errors import RecipeError
from tunesmith.config.schema import Recipe

Key = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string and `no` as False; recipes mean a number and a word."""


_REPLACED = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:bool"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in rules if tag not in _REPLACED]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF")
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Raises RecipeError with one `FILE:LINE: key: what is wrong` line per fault.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise RecipeError(f"{path}: cannot read the recipe: {reason}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: the recipe is not UTF-8 text: {error}") from error
    values, places = _parse(text, str(path))
    for override in overrides:
        _apply(override, values, places)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail, places, str(path)) for detail in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved copy: every key with its value, as YAML that loads to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[Key, str]]:
    """The mapping, and for each key path the `FILE:LINE` it stands at."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{name}{line}: not valid YAML: {problem}") from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{name}:1: a recipe is a mapping that starts with `name:` and `model:`")
    places: dict[Key, str] = {(): f"{name}:1"}
    for key, where in _walk(node, (), name):
        places[key] = where
    values = _Loader(text).construct_document(node)
    return values, places


def _walk(node: yaml.Node, prefix: Key, name: str) -> Iterator[tuple[Key, str]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = str(key_node.value)
            path = ".".join(map(str, (*prefix, key)))
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{name}:{line}: a key must be a plain word")
            if key in seen:
                raise RecipeError(f"{name}:{line}: {path}: given twice (first on line {seen[key]})")
            seen[key] = line
            yield (*prefix, key), f"{name}:{line}"
            yield from _walk(value_node, (*prefix, key), name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*prefix, index), f"{name}:{item.start_mark.line + 1}"
            yield from _walk(item, (*prefix, index), name)


def _apply(override: str, values: dict[str, Any], places: dict[Key, str]) -> None:
    """Set one dotted key; the value is read as YAML."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RecipeError(
            f'override "{override}": write it as key=value, such as train.learning_rate=1e-4'
        )
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f'override "{override}": the value is not valid YAML') from error
    *parents, last = dotted.split(".")
    target = values
    for depth, key in enumerate(parents):
        places.setdefault(tuple(parents[: depth + 1]), f'override "{override}"')
        inner = target.get(key)
        if inner is None:
            inner = target[key] = {}
        if not isinstance(inner, dict):
            at = ".".join(parents[: depth + 1])
            raise RecipeError(f'override "{override}": {at} is a value, not a section')
        target = inner
    target[last] = value
    key_path = tuple(dotted.split("."))
    for known in [known for known in places if known[: len(key_path)] == key_path]:
        del places[known]
    places[key_path] = f'override "{override}"'


def _explain(detail: ErrorDetails, places: dict[Key, str], name: str) -> str:
    location = tuple(part for part in detail["loc"] if not _is_union_tag(part))
    where = _place(location, places) or name
    dotted = ".".join(map(str, location))
    if detail["type"] == "extra_forbidden":
        return f"{where}: {dotted}: unknown key; {_suggest(location)}"
    if detail["type"] == "missing":
        return f"{where}: {dotted}: required, and not given"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = detail["input"]
    shown = "" if isinstance(given, (dict, BaseModel)) else f", got {given!r}"
    return f"{where}: {dotted}: {message}{shown}" if dotted else f"{where}: {message}"


def _is_union_tag(part: str | int) -> bool:
    """Pydantic adds the branch of a union (`str`, `tuple[...]`, `literal[...]`) to the location."""
    return isinstance(part, str) and bool(re.match(r"^(str|tuple|literal|int|float)(\[|$)", part))


def _place(location: Key, places: dict[Key, str]) -> str | None:
    for end in range(len(location), -1, -1):
        if location[:end] in places:
            return places[location[:end]]
    return None


def _suggest(location: Key) -> str:
    """The nearest key of the same section, or the section that the key belongs to."""
    from rapidfuzz.distance import OSA

    *parents, last = map(str, location)
    siblings = list(fields_at(parents))
    elsewhere = [path for path in leaf_keys() if path.split(".")[-1] == last]
    if elsewhere:
        return f'did you mean "{elsewhere[0]}"?'
    ranked = sorted(siblings, key=lambda key: OSA.distance(last.lower(), key.lower()))
    if ranked and OSA.distance(last.lower(), ranked[0].lower()) <= max(2, len(last) // 3):
        return f'did you mean "{ranked[0]}"?'
    return f"allowed here: {', '.join(sorted(siblings))}"


def fields_at(path: Iterable[str]) -> tuple[str, ...]:
    """The keys that a section, or an item of a list, allows; empty where the path is neither."""
    model: type[BaseModel] | None = Recipe
    parts = iter(path)
    for part in parts:
        if part.isdecimal():
            continue
        field = model.model_fields.get(part) if model else None
        model = section_of(field.annotation) or item_of(field.annotation) if field else None
        if field and (named := named_of(field.annotation)):
            next(parts, None)
            model = named
    return tuple(model.model_fields) if model else ()


def leaf_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema that holds a value."""
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner:
            yield from leaf_keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class behind `Section` or `Section | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for arm in typing.get_args(annotation):
            if found := section_of(arm):
                return found
    return None


def named_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of the values where a key holds sections by names of the user's."""
    if typing.get_origin(annotation) is dict:
        return section_of(typing.get_args(annotation)[1])
    return None


def item_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of the items where a value can be a list of sections."""
    if typing.get_origin(annotation) is tuple:
        return section_of(typing.get_args(annotation)[0])
    found = map(item_of, typing.get_args(annotation))
    return next(filter(None, found), None)
