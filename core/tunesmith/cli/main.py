"""`tunesmith …`: every command, its arguments, and the exit code of every error."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.bench import bench_app
from tunesmith.cli.execute import (
    AsJson,
    Discard,
    LedgerUrl,
    Overrides,
    RecipePath,
    StoreFolder,
    execute,
    open_store,
    resumable,
)
from tunesmith.cli.feedback import feedback_app
from tunesmith.cli.govern import keys_app, usage
from tunesmith.cli.output import print_result
from tunesmith.cli.rollout import rollout_app

app = typer.Typer(
    name="tunesmith",
    help="One recipe from a dataset to a fine-tuned, quantized, served and costed LLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench_app, name="bench")
app.add_typer(keys_app, name="keys")
app.add_typer(rollout_app, name="rollout")
app.add_typer(feedback_app, name="feedback")
app.command()(usage)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Validate a recipe: every fault with its line. Reads nothing else, spends nothing."""
    from tunesmith.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    sections = [name for name in _SECTIONS if getattr(loaded, name) is not None]
    typer.echo(f"{recipe}: {loaded.name}: ok ({', '.join(sections)})")


_SECTIONS = ("data", "train", "quantize", "evaluate", "batch", "serve", "bench", "price")


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for completion in an editor."""
    from tunesmith.config.schema import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    device: Annotated[
        str, typer.Option(help="A known GPU, such as h100, in place of this machine.")
    ] = "this",
    as_json: AsJson = False,
) -> None:
    """Say what would run: each stage's artifact, made or not; steps, tokens, memory, hours, USD.

    Ends with exit code 3 when the training would not fit the device."""
    execute("plan", recipe, overrides, as_json, device=device)


ShownRows = Annotated[
    int,
    typer.Option(
        "--rows", min=0, help="Rows to show token by token; 0 counts rows and tokenises nothing."
    ),
]


@app.command()
def data(
    recipe: RecipePath, overrides: Overrides = None, rows: ShownRows = 2, as_json: AsJson = False
) -> None:
    """Read, check and split the recipe's data, and show what a model learns of it."""
    execute("data", recipe, overrides, as_json, rows=rows)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    discard: Discard = False,
) -> None:
    """Train the adapter or the model, and merge it."""
    execute("train", recipe, overrides, as_json, discard=discard)


@app.command()
def quantize(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Make the compressed checkpoints, and compare each with its parent in the engine.

    Ends with exit code 3 when one is refused."""
    execute("quantize", recipe, overrides, as_json)


@app.command()
def recover(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    discard: Discard = False,
) -> None:
    """Train the adapters that win back what quantization lost."""
    execute("recover", recipe, overrides, as_json, discard=discard)


@app.command("eval")
def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    fidelity: Annotated[
        bool,
        typer.Option("--fidelity", help="Verify the compressed checkpoints against their parent."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the quality of every model of the recipe on held-out rows."""
    execute("eval fidelity" if fidelity else "eval", recipe, overrides, as_json)


@app.command()
def batch(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    discard: Discard = False,
) -> None:
    """Answer a file of prompts."""
    execute("batch", recipe, overrides, as_json, discard=discard)


@app.command()
def serve(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Serve the OpenAI API until Ctrl-C."""
    execute("serve", recipe, overrides, as_json)


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    discard: Discard = False,
) -> None:
    """Do every section of the recipe in order, reuse what is made, and write the report."""
    from tunesmith.pipeline.run import run_recipe, show

    with resumable():
        result = run_recipe(recipe, tuple(overrides or ()), discard=discard)
    print_result(result, show, as_json)


@app.command()
def show(
    reference: Annotated[str | None, typer.Argument(metavar="[ID | NAME[@ALIAS]]")] = None,
    store: StoreFolder = Path(".tunesmith"),
    ledger: LedgerUrl = None,
    rebuild: Annotated[bool, typer.Option(help="Rebuild the ledger from the manifests.")] = False,
    as_json: AsJson = False,
) -> None:
    """List artifacts, or show one with its lineage and metrics."""
    from tunesmith.cli import show as views

    print_result(*views.show(open_store(store, ledger), reference, rebuild), as_json)


@app.command()
def verify(
    reference: Annotated[str, typer.Argument(metavar="ID | NAME@ALIAS")],
    store: StoreFolder = Path(".tunesmith"),
    ledger: LedgerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Hash every file of an artifact and of everything it was made from."""
    from tunesmith.cli import show as views

    print_result(*views.verify(open_store(store, ledger), reference), as_json)


@app.command()
def export(
    reference: Annotated[str, typer.Argument(metavar="ID | NAME@ALIAS")],
    to: Annotated[
        str, typer.Option(help="A new folder, a URI such as s3://bucket/model, or hub:OWNER/NAME.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see a new repository on the hub.")
    ] = False,
    allow_refused: Annotated[
        bool, typer.Option("--allow-refused", help="Export what its verification refused.")
    ] = False,
    store: StoreFolder = Path(".tunesmith"),
    ledger: LedgerUrl = None,
) -> None:
    """Copy a model with its manifest and a card to where it is used without this store."""
    from tunesmith.ledger import deliver
    from tunesmith.pipeline.verdict import require_no_refusal

    opened = open_store(store, ledger)
    artifact = opened.get(reference)
    require_no_refusal(opened, artifact.id, allowed=allow_refused)
    typer.echo(deliver(opened, artifact, to, public=public))


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="NAME@ALIAS")],
    artifact: Annotated[str, typer.Argument(help="The id it shall point to.")],
    expect: Annotated[
        str | None, typer.Option(help="The id it points to now; refused when that changed.")
    ] = None,
    store: StoreFolder = Path(".tunesmith"),
    ledger: LedgerUrl = None,
) -> None:
    """Point an alias at an artifact, only if nobody moved it meanwhile."""
    from tunesmith.config import UserError

    recipe_name, at, alias_name = name.partition("@")
    if not (recipe_name and at and alias_name):
        raise UserError(f"{name}: write it as NAME@ALIAS, such as support-bot@production")
    open_store(store, ledger).index.set_alias(recipe_name, alias_name, artifact, expected=expect)
    typer.echo(f"{name} → {artifact}")


def main() -> None:
    """Run a command and leave with its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except Exception as error:
        from tunesmith.cli.failures import exit_code_for

        sys.exit(exit_code_for(error))


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
