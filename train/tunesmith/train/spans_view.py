"""Tokenised rows on a terminal: what is learnt stands out, also without colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.terminal import make_table

_BAR_WIDTH = 48
_SHOWN_CHARACTERS = 600
_STYLES = {"context": "default", "learnt": "bold green", "cut": "strike red"}
_SPECIAL_STYLES = {"context": "cyan", "learnt": "bold reverse green", "cut": "strike dim red"}
_MARKS = {"context": ("", ""), "learnt": ("⟦", "⟧"), "cut": ("✂", "✂")}


def show_tokens(tokens: Mapping[str, Mapping[str, Any]]) -> Table:
    """Sizes and losses of both sides."""
    sides = list(tokens.values())
    rows = [
        (name.replace("_", " "), *(f"{side[name]:,}" for side in sides))
        for name in ("rows", "sequences", "tokens", "supervised_tokens")
    ]
    rows.append(("supervised share", *(f"{side['supervised_share']:.1%}" for side in sides)))
    for name in sides[0]["lengths"]:
        rows.append((f"length, {name}", *(f"{side['lengths'][name]:,}" for side in sides)))
    rows.append(("truncated", *(f"{side['truncated']:,}" for side in sides)))
    for reason in sides[0]["dropped"]:
        rows.append((f"dropped: {reason}", *(f"{side['dropped'][reason]:,}" for side in sides)))
    return make_table("tokens", ("", *tokens), rows)


def show_lengths(side: Mapping[str, Any]) -> Table:
    """A bar per bin of lengths."""
    table = Table(title="training sequences by length", title_justify="left", title_style="bold")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("sequences", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    highest = max(part["sequences"] for part in side["histogram"])
    for part in side["histogram"]:
        bar = "█" * -(-part["sequences"] * _BAR_WIDTH // highest)
        table.add_row(
            f"{part['from']:,}–{part['to']:,}", f"{part['sequences']:,}", Text(bar, "cyan")
        )
    return table


def show_row(row: Mapping[str, Any]) -> RenderableType:
    """One row: learnt text in ⟦ ⟧ and green, special tokens in a colour of
    their own, what is cut off between ✂."""
    if row["refused"]:
        return Text(f"\nrow {row['id']}: refused: {row['refused']}", "red")
    parts: list[RenderableType] = []
    for sequence in row["sequences"]:
        cut = f", {sequence['cut_tokens']:,} cut off" if sequence["cut_tokens"] else ""
        name = f", {sequence['name']}" if sequence["name"] else ""
        head = (
            f"\nrow {row['id']}{name}: {sequence['tokens']:,} tokens, "
            f"{sequence['learnt_tokens']:,} learnt{cut}"
        )
        parts += [Text(head, "bold"), _show_spans(sequence["spans"])]
    return Group(*parts)


def _show_spans(spans: Sequence[Mapping[str, Any]]) -> Text:
    shown = Text()
    before = "context"
    for span in [*spans, {"text": "", "state": "context", "special": False}]:
        state = span["state"]
        if state != before:
            shown.append(_MARKS[before][1], _STYLES[before])
            shown.append(_MARKS[state][0], _STYLES[state])
        style = (_SPECIAL_STYLES if span["special"] else _STYLES)[state]
        shown.append(_shortened(span["text"], state), style)
        before = state
    shown.rstrip()
    return shown


def _shortened(text: str, state: str) -> str:
    """What is learnt whole; of the rest, the middle can be left out."""
    left_out = len(text) - _SHOWN_CHARACTERS
    if state == "learnt" or left_out <= 0:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {left_out:,} characters … {text[-half:]}"
