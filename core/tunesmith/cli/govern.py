"""`tunesmith keys …` and `tunesmith usage`: who may ask a gateway, and who used what."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.output import print_result

keys_app = typer.Typer(
    help="Keys for `tunesmith serve`, with their limits and budgets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

StoreFolder = Annotated[Path, typer.Option("--store", help="The store's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="As `tunesmith keys list` shows it.")]
PerMinute = Annotated[int | None, typer.Option(min=1, help="Requests in any minute.")]
TokensPerMinute = Annotated[int | None, typer.Option(min=1, help="Tokens in any minute.")]
Concurrent = Annotated[int | None, typer.Option(min=1, help="Requests open at once.")]
TokensPerDay = Annotated[int | None, typer.Option(min=1, help="Tokens in a day (UTC).")]
UsdPerDay = Annotated[float | None, typer.Option(min=0.0, help="USD in a day (UTC).")]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DEFAULT_STORE = Path(".tunesmith")


@keys_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    group: Annotated[str | None, typer.Option(help="A group, whose limits hold too.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model that it may ask; all when not given.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="After this long, such as 90d.")] = None,
    requests_per_minute: PerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent_requests: Concurrent = None,
    tokens_per_day: TokensPerDay = None,
    usd_per_day: UsdPerDay = None,
    store: StoreFolder = _DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    from tunesmith.serve.govern.keys import create_key
    from tunesmith.serve.govern.limits import Limits

    key_id, text = create_key(
        open_gateway_of(store),
        name,
        group=group,
        models=tuple(model or ()),
        limits=Limits(
            requests_per_minute,
            tokens_per_minute,
            concurrent_requests,
            tokens_per_day,
            usd_per_day,
        ),
        expires_s=None if expires is None else time.time() + seconds_of(expires),
    )
    _print_key(key_id, text, as_json)


@keys_app.command("list")
def list_keys(store: StoreFolder = _DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Every key with its limits, without its secret."""
    from tunesmith.serve.govern.keys import read_book

    now_s = time.time()
    found: list[dict[str, Any]] = [
        {
            "id": key.id,
            "name": key.name,
            "group": key.group,
            "state": key.state(now_s),
            "models": list(key.models),
            "limits": key.limits.given(),
            "group_limits": key.group_limits.given(),
            "created": _day(key.created_s),
            "expires": _day(key.expires_s),
        }
        for key in read_book(open_gateway_of(store)).keys.values()
    ]
    print_result({"keys": found}, _keys_table, as_json)


@keys_app.command()
def revoke(key_id: KeyId, store: StoreFolder = _DEFAULT_STORE) -> None:
    """End a key for good; gateways that run stop taking it within a second."""
    from tunesmith.serve.govern.keys import revoke_key

    revoke_key(open_gateway_of(store), key_id)
    typer.echo(f"{key_id} is revoked")


@keys_app.command()
def rotate(
    key_id: KeyId,
    overlap: Annotated[str, typer.Option(help="How long the old secret stays good.")] = "24h",
    store: StoreFolder = _DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Give a key a new secret and print it, this once; its limits and its use go on."""
    from tunesmith.serve.govern.keys import rotate_key

    text = rotate_key(open_gateway_of(store), key_id, overlap_s=seconds_of(overlap))
    _print_key(key_id, text, as_json)


@keys_app.command("group")
def set_group(
    name: Annotated[str, typer.Argument(help="The group.")],
    requests_per_minute: PerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent_requests: Concurrent = None,
    tokens_per_day: TokensPerDay = None,
    usd_per_day: UsdPerDay = None,
    store: StoreFolder = _DEFAULT_STORE,
) -> None:
    """Set the limits that all keys of a group share; those not given are taken off."""
    from tunesmith.serve.govern import keys
    from tunesmith.serve.govern.limits import Limits

    limits = Limits(
        requests_per_minute, tokens_per_minute, concurrent_requests, tokens_per_day, usd_per_day
    )
    keys.set_group(open_gateway_of(store), name, limits)
    typer.echo(f"{name}: {_limits(limits.given()) or 'no limits'}")


def usage(
    by: Annotated[
        str,
        typer.Option(help="key, group, model, artifact, route, arm, experiment, status or day."),
    ] = "key",
    since: Annotated[str, typer.Option(help="How far back, such as 24h or 30d.")] = "30d",
    store: StoreFolder = _DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Requests, tokens and cost from the request log of `tunesmith serve`."""
    from tunesmith.serve.govern import report

    result = report.usage(
        open_gateway_of(store), store / "serve", by, time.time() - seconds_of(since)
    )
    print_result(result, report.show, as_json)


def seconds_of(text: str) -> int:
    """`90d`, `24h`, `30m` or `45s` in seconds. Raises UserError on anything else."""
    from tunesmith.config import UserError

    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None:
        raise UserError(f"{text}: write a time as 45s, 30m, 24h or 90d")
    return int(match[1]) * _SECONDS[match[2]]


def open_gateway_of(store: Path) -> Any:
    """The database of a store's gateway. Raises UserError where there is no store."""
    from tunesmith.config import UserError

    try:
        from tunesmith.serve.govern.database import open_gateway
    except ModuleNotFoundError as error:
        from tunesmith.config import MissingExtraError

        raise MissingExtraError(str(error.name), "infer") from error
    if not (store / "artifacts").is_dir():
        raise UserError(f"{store} is not a store; name it with --store FOLDER")
    return open_gateway(store)


def _print_key(key_id: str, text: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"id": key_id, "key": text}))
        return
    typer.echo(text)
    typer.echo(f"keep it now: it is not shown again (its id is {key_id})", err=True)


def _limits(limits: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in limits.items())


def _day(moment_s: float | None) -> str | None:
    return None if moment_s is None else time.strftime("%Y-%m-%d", time.gmtime(moment_s))


def _keys_table(result: dict[str, Any]) -> Any:
    from tunesmith.terminal import make_table

    columns = ("id", "name", "group", "state", "models", "limits", "expires")
    rows = [
        (
            key["id"],
            key["name"],
            key["group"] or "",
            key["state"],
            ", ".join(key["models"]) or "all",
            _limits(key["limits"]),
            key["expires"] or "",
        )
        for key in result["keys"]
    ]
    return make_table("Keys", columns, rows)
