"""What a chat template's syntax tree says about it, without rendering anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import Environment, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which surrounds what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@dataclass(frozen=True)
class JinjaTemplate:
    """One template of a tokenizer, and what has to be known of it to apply it."""

    text: str

    as_parts: bool
    """It walks through a message's content part by part."""

    marked: bool
    """It has `{% generation %}` marks."""

    names: frozenset[str]
    """The variables that it reads."""

    @classmethod
    def of(cls, text: str) -> JinjaTemplate:
        """Raises jinja2.TemplateSyntaxError."""
        tree = parse(text)
        names = frozenset(meta.find_undeclared_variables(tree))
        return cls(text, loops_over_content(tree), has_marks(tree), names)


def parse(template: str) -> nodes.Template:
    """Raises jinja2.TemplateSyntaxError."""
    return Environment(extensions=[_Generation, loopcontrols]).parse(template)


def has_marks(tree: nodes.Template) -> bool:
    """Whether the template says by itself what the assistant writes."""
    # Jinja's own statements never make a bare Scope; only the extension above does.
    return next(tree.find_all(nodes.Scope), None) is not None


def loops_over_content(tree: nodes.Template) -> bool:
    """Whether a template walks through a message's content part by part, as the engine decides it:
    from `for` loops over the content of a message, or over a macro's parameter that is given it.
    """
    turns = _message_names(tree)
    in_macros = {id(loop) for macro in tree.find_all(nodes.Macro) for loop in _loops(macro)}
    for loop in _loops(tree):
        subject = _subject(loop.iter)
        if _is_content(subject, turns):
            return True
        if id(loop) not in in_macros and _is_name(subject, {"content"}):
            return True
    return any(
        _is_name(_subject(loop.iter), _content_parameters(tree, macro, turns))
        for macro in tree.find_all(nodes.Macro)
        for loop in _loops(macro)
    )


def _message_names(tree: nodes.Template) -> set[str]:
    """The names under which loops over the conversation know one message."""
    lists, size = {"messages"}, 0
    while size < len(lists):
        size = len(lists)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_name(_subject(assign.node), lists):
                lists.add(assign.target.name)
    return {
        loop.target.name
        for loop in _loops(tree)
        if isinstance(loop.target, nodes.Name) and _is_name(_subject(loop.iter), lists)
    }


def _loops(node: nodes.Node) -> Iterator[nodes.For]:
    return node.find_all(nodes.For)


def _subject(node: nodes.Node | None) -> nodes.Node | None:
    """What an expression is about, below its filters, tests and slices."""
    while isinstance(node, (nodes.Filter, nodes.Test)) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    return node


def _is_name(node: nodes.Node | None, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and node.name in names


def _is_content(node: nodes.Node | None, turns: set[str]) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content" and _is_name(node.node, turns)
    if isinstance(node, nodes.Getitem):
        key = node.arg.value if isinstance(node.arg, nodes.Const) else None
        return key == "content" and _is_name(node.node, turns)
    return False


def _content_parameters(tree: nodes.Template, macro: nodes.Macro, turns: set[str]) -> set[str]:
    """The macro's parameters that some call gives a message's content."""
    names = [argument.name for argument in macro.args]
    found = set()
    for call in tree.find_all(nodes.Call):
        if _is_name(call.node, {macro.name}):
            given = list(zip(names, call.args, strict=False))
            given += [(pair.key, pair.value) for pair in call.kwargs if pair.key in names]
            found |= {name for name, value in given if _is_content(_subject(value), turns)}
    return found
