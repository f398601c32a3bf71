"""`tunesmith rollout …`: move a route of a running gateway to another model, by evidence or at
once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.govern import AsJson, StoreFolder, open_gateway_of
from tunesmith.cli.output import print_result

rollout_app = typer.Typer(
    help="Move a route of a running `tunesmith serve` to another model, and back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Route = Annotated[str, typer.Argument(help="The model name that clients ask for.")]
Target = Annotated[
    str,
    typer.Option(
        "--to",
        help="An upstream, a model of the recipe such as w4a16, an artifact's id or NAME@ALIAS, "
        "or the folder of an adapter.",
    ),
]
_DEFAULT_STORE = Path(".tunesmith")


@rollout_app.command()
def start(
    route: Route, to: Target, store: StoreFolder = _DEFAULT_STORE, as_json: AsJson = False
) -> None:
    """Load a model and give it a growing share of a route, for as long as it does no worse."""
    _ask(store, route, "start", to, as_json)


@rollout_app.command()
def swap(
    route: Route, to: Target, store: StoreFolder = _DEFAULT_STORE, as_json: AsJson = False
) -> None:
    """Load a model and lead all of a route to it at once; what answered before is let go."""
    _ask(store, route, "swap", to, as_json)


@rollout_app.command()
def promote(route: Route, store: StoreFolder = _DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Give the new model all of the route now."""
    _ask(store, route, "promote", None, as_json)


@rollout_app.command()
def abort(route: Route, store: StoreFolder = _DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Give the route back to what answered it before."""
    _ask(store, route, "abort", None, as_json)


@rollout_app.command()
def status(
    route: Annotated[str | None, typer.Argument(help="One route; all when not given.")] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Decide again from the recorded evidence.")
    ] = False,
    last: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 5,
    store: StoreFolder = _DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Rollouts with their evidence and every decision.

    With --replay it ends with exit code 3 when a recorded decision does not come out again."""
    database = open_gateway_of(store)
    from tunesmith.config import GateError
    from tunesmith.serve.rollout.report import rollout_report, show

    result = rollout_report(database, route, last)
    print_result(result, show, as_json)
    odd = [
        f"rollout {one['id']}: {decision['action']} at {decision['at']}"
        for one in result["rollouts"]
        for decision in one["decisions"]
        if isinstance(decision["replay"], dict)
    ]
    if replay and odd:
        raise GateError(f"not what the evidence says: {'; '.join(odd)}")


def _ask(store: Path, route: str, what: Any, target: str | None, as_json: bool) -> None:
    database = open_gateway_of(store)
    from tunesmith.serve.control import ask_gateway

    if target and Path(target).is_dir():
        target = str(Path(target).absolute())
    started_s = time.monotonic()
    message = ask_gateway(database, route, what, target)
    seconds = round(time.monotonic() - started_s, 3)
    result = {"route": route, "command": what, "to": target, "result": message, "seconds": seconds}
    print_result(result, lambda found: found["result"], as_json)
