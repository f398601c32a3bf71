"""How a command runs: its module is imported on use, its result printed, Ctrl-C is resumable."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.output import print_result

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values in place of the recipe's."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Discard = Annotated[
    bool,
    typer.Option("--discard", help="Drop interrupted work that this recipe differs from."),
]

StoreFolder = Annotated[Path, typer.Option("--store", help="The store's folder.")]
LedgerUrl = Annotated[str | None, typer.Option("--ledger", help="URL of a shared ledger.")]

# Where each command lives, and the extra that brings what it imports.
_COMMANDS = {
    "plan": ("tunesmith.cli.plan", "train"),
    "data": ("tunesmith.train.preview", "train"),
    "train": ("tunesmith.train.command", "train"),
    "quantize": ("tunesmith.quantize.command", "quantize"),
    "recover": ("tunesmith.train.recover", "train"),
    "eval": ("tunesmith.evaluate.command", "infer"),
    "eval fidelity": ("tunesmith.evaluate.fidelity.command", "infer"),
    "batch": ("tunesmith.batch.command", "infer"),
    "serve": ("tunesmith.serve.command", "infer"),
    "feedback export": ("tunesmith.serve.feedback.export", "infer"),
    "bench": ("tunesmith.bench.command", "infer"),
    "bench sweep": ("tunesmith.bench.sweep", "infer"),
    "bench settings": ("tunesmith.bench.settings", "infer"),
    "bench frontier": ("tunesmith.bench.frontier", "infer"),
    "bench train": ("tunesmith.train.bench", "train"),
}


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C and SIGTERM end long work with the exit code that says: run it again."""
    try:
        yield
    except KeyboardInterrupt as error:
        from tunesmith.config import WorkInterrupted

        raise WorkInterrupted("interrupted; run the same command again to resume") from error


def execute(
    command: str,
    path: Path,
    overrides: list[str] | None,
    as_json: bool,
    evaluated: str | None = None,
    **arguments: Any,
) -> None:
    """Load the recipe, run the command's module on it, and print the result.

    Of the models that the mode `evaluated` of bench compares, quality is measured first, where the
    recipe says how.
    """
    from tunesmith.config import load_recipe
    from tunesmith.pipeline import Stages

    stages = Stages(load_recipe(path, overrides or ()), path=str(path))
    module = _module(command)
    with resumable():
        if evaluated and stages.recipe.evaluate:
            _module("eval").run(stages, stages.benched(evaluated))
        result = module.run(stages, **arguments)
    print_result(result, module.show, as_json)


def _module(command: str) -> Any:
    from tunesmith.config import MissingExtraError

    name, extra = _COMMANDS[command]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tunesmith"):
            raise
        raise MissingExtraError(error.name, extra) from error


def open_store(folder: Path, ledger: str | None) -> Any:
    """The store of a folder. Raises UserError when it is none."""
    from tunesmith.config import UserError
    from tunesmith.ledger import Store

    if not (folder / "artifacts").is_dir():
        raise UserError(f"{folder} is not a store; name it with --store FOLDER")
    return Store(folder, ledger)
