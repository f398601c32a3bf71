"""`tunesmith bench …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.execute import (
    AsJson,
    LedgerUrl,
    Overrides,
    RecipePath,
    StoreFolder,
    execute,
    open_store,
)
from tunesmith.cli.output import print_result

bench_app = typer.Typer(help="Measure speed and cost.", no_args_is_help=True, rich_markup_mode=None)


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
    options: dict[str, Any] = {"shape": shape, "length": length, "peer": peer, "profile": profile}
    counts: dict[str, Any] = {"steps": steps, "warmup_steps": warmup_steps, "rounds": rounds}
    execute("bench train", recipe, overrides, as_json, **options, **counts)


@bench_app.command("batch")
def bench_batch(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Throughput and cost with a full queue."""
    execute("bench", recipe, overrides, as_json, mode="batch")


@bench_app.command("serve")
def bench_serve(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Latency, goodput and cost under arriving requests."""
    execute("bench", recipe, overrides, as_json, mode="serve")


@bench_app.command("all")
def bench_all(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Both, with one engine start per model."""
    execute("bench", recipe, overrides, as_json, mode="all")


@bench_app.command("sweep")
def bench_sweep(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Many rates and numbers in flight, and the highest rate that keeps the promise."""
    execute("bench sweep", recipe, overrides, as_json)


@bench_app.command("settings")
def bench_settings(
    recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Which values of the engine section matter for a model, and which are best."""
    execute("bench settings", recipe, overrides, as_json)


@bench_app.command("frontier")
def bench_frontier(
    recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Quality, goodput, price and memory of every model, and the cheapest that is good enough."""
    execute("bench frontier", recipe, overrides, as_json, evaluated="frontier")


@bench_app.command("report")
def bench_report(
    reference: Annotated[str, typer.Argument(metavar="ID", help="Of a benchmark.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("bench.html"),
    store: StoreFolder = Path(".tunesmith"),
    ledger: LedgerUrl = None,
) -> None:
    """Write a page with the figures of a benchmark and its plots."""
    from tunesmith.bench.page import write_page

    typer.echo(write_page(open_store(store, ledger), reference, out))


@bench_app.command("compare")
def bench_compare(
    first: Annotated[str, typer.Argument(metavar="A", help="ID, ID:MODEL, or a bench.json.")],
    second: Annotated[str, typer.Argument(metavar="B", help="What is compared with it.")],
    store: StoreFolder = Path(".tunesmith"),
    ledger: LedgerUrl = None,
    as_json: AsJson = False,
) -> None:
    """Say whether B is faster than A, slower, or no difference is shown."""
    from tunesmith.bench import compare

    print_result(compare.run(open_store(store, ledger), first, second), compare.show, as_json)
