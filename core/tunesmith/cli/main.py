"""`tunesmith …`: every command, its arguments, and the exit code of every error."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.govern import keys_app, usage
from tunesmith.cli.output import print_result

app = typer.Typer(
    name="tunesmith",
    help="One recipe from a dataset to a fine-tuned, quantized, served and costed LLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app = typer.Typer(help="Measure speed and cost.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")
app.add_typer(keys_app, name="keys")
feedback_app = typer.Typer(
    help="What people say of served answers.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(feedback_app, name="feedback")
app.command()(usage)

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
    "bench train": ("tunesmith.train.bench", "train"),
}


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
    _execute("plan", recipe, overrides, as_json, device=device)


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
    _execute("data", recipe, overrides, as_json, rows=rows)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    discard: Discard = False,
) -> None:
    """Train the adapter or the model, and merge it."""
    _execute("train", recipe, overrides, as_json, discard=discard)


@app.command()
def quantize(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Make the compressed checkpoints, and compare each with its parent in the engine.

    Ends with exit code 3 when one is refused."""
    _execute("quantize", recipe, overrides, as_json)


@app.command()
def recover(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    discard: Discard = False,
) -> None:
    """Train the adapters that win back what quantization lost."""
    _execute("recover", recipe, overrides, as_json, discard=discard)


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
    _execute("eval fidelity" if fidelity else "eval", recipe, overrides, as_json)


@app.command()
def batch(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    discard: Discard = False,
) -> None:
    """Answer a file of prompts."""
    _execute("batch", recipe, overrides, as_json, discard=discard)


@app.command()
def serve(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Serve the OpenAI API until Ctrl-C."""
    _execute("serve", recipe, overrides, as_json)


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
    _execute("feedback export", recipe, overrides, as_json, kind=kind, min_score=min_score)


@bench_app.command("train")
def bench_train(
    recipe: RecipePath,
    overrides: Overrides = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights and rows: tiny, llama-1b, llama-8b or llama-70b."),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of each random row.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a round.")] = 10,
    warmup_steps: Annotated[int, typer.Option(help="Steps before the first round.")] = 5,
    rounds: Annotated[int, typer.Option(help="How often it is measured.")] = 3,
    peer: Annotated[
        str | None, typer.Option(help="Also train with this program, in turns: trl.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also list where a step's time goes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Training speed, memory, and the share of what this device can do."""
    options = {"shape": shape, "length": length, "peer": peer, "profile": profile}
    counts = {"steps": steps, "warmup_steps": warmup_steps, "rounds": rounds}
    _execute("bench train", recipe, overrides, as_json, **options, **counts)


@bench_app.command("batch")
def bench_batch(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Throughput and cost with a full queue."""
    _execute("bench", recipe, overrides, as_json, mode="batch")


@bench_app.command("serve")
def bench_serve(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Latency, goodput and cost under arriving requests."""
    _execute("bench", recipe, overrides, as_json, mode="serve")


@bench_app.command("all")
def bench_all(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Both, with one engine start per model."""
    _execute("bench", recipe, overrides, as_json, mode="all")


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    discard: Discard = False,
) -> None:
    """Do every section of the recipe in order, reuse what is made, and write the report."""
    from tunesmith.pipeline.run import run_recipe, show

    with _resumable():
        result = run_recipe(recipe, tuple(overrides or ()), discard=discard)
    print_result(result, show, as_json)


StoreFolder = Annotated[Path, typer.Option("--store", help="The store's folder.")]
LedgerUrl = Annotated[str | None, typer.Option("--ledger", help="URL of a shared ledger.")]


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

    print_result(*views.show(_open_store(store, ledger), reference, rebuild), as_json)


@app.command()
def verify(
    reference: Annotated[str, typer.Argument(metavar="ID | NAME@ALIAS")],
    store: StoreFolder = Path(".tunesmith"),
    ledger: LedgerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Hash every file of an artifact and of everything it was made from."""
    from tunesmith.cli import show as views

    print_result(*views.verify(_open_store(store, ledger), reference), as_json)


@app.command()
def export(
    reference: Annotated[str, typer.Argument(metavar="ID | NAME@ALIAS")],
    to: Annotated[
        str, typer.Option(help="A new folder, a URI such as s3://bucket/model, or hub:OWNER/NAME.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see a new repository on the hub.")
    ] = False,
    store: StoreFolder = Path(".tunesmith"),
    ledger: LedgerUrl = None,
) -> None:
    """Copy a model with its manifest and a card to where it is used without this store."""
    from tunesmith.ledger import deliver

    opened = _open_store(store, ledger)
    typer.echo(deliver(opened, opened.get(reference), to, public=public))


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
    _open_store(store, ledger).index.set_alias(recipe_name, alias_name, artifact, expected=expect)
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


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """Ctrl-C and SIGTERM end long work with the exit code that says: run it again."""
    try:
        yield
    except KeyboardInterrupt as error:
        from tunesmith.config import WorkInterrupted

        raise WorkInterrupted("interrupted; run the same command again to resume") from error


def _execute(
    command: str, path: Path, overrides: list[str] | None, as_json: bool, **arguments: Any
) -> None:
    from tunesmith.config import MissingExtraError, load_recipe
    from tunesmith.pipeline import Stages

    recipe = load_recipe(path, overrides or ())
    module_name, extra = _COMMANDS[command]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tunesmith"):
            raise
        raise MissingExtraError(error.name, extra) from error
    with _resumable():
        result = module.run(Stages(recipe, path=str(path)), **arguments)
    print_result(result, module.show, as_json)


def _open_store(folder: Path, ledger: str | None) -> Any:
    from tunesmith.config import UserError
    from tunesmith.ledger import Store

    if not (folder / "artifacts").is_dir():
        raise UserError(f"{folder} is not a store; name it with --store FOLDER")
    return Store(folder, ledger)
