"""Results of commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import typer


def print_result(
    result: dict[str, Any], view: Callable[[dict[str, Any]], Any], as_json: bool
) -> None:
    """Results go to stdout: a table for people, or JSON."""
    if as_json:
        typer.echo(json.dumps(result, indent=2, default=str))
        return
    from rich.console import Console

    # A pipe or a file has no width; folded ids would be of no use there.
    Console(width=None if sys.stdout.isatty() else 160).print(view(result))
