"""`tunesmith feedback …`."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.execute import AsJson, Overrides, RecipePath, execute

feedback_app = typer.Typer(
    help="What people say of served answers.", no_args_is_help=True, rich_markup_mode=None
)


@feedback_app.callback()
def _feedback() -> None:
    """What people say of served answers."""


@feedback_app.command("export")
def feedback_export(
    recipe: RecipePath,
    overrides: Overrides = None,
    kind: Annotated[
        str, typer.Option(help="messages (for fine-tuning) or preference (for DPO, ORPO).")
    ] = "messages",
    min_score: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Answers without a correction need this.")
    ] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Make a data set of what people corrected, liked or preferred, without rows that any
    evaluation set of the store has."""
    execute("feedback export", recipe, overrides, as_json, kind=kind, min_score=min_score)
