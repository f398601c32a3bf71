"""Rollouts as `tunesmith rollout status` shows them."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from sqlalchemy.engine import Engine

from tunesmith.config import UserError
from tunesmith.serve.rollout.record import read_decisions, read_rollouts
from tunesmith.terminal import make_table


def rollout_report(database: Engine, route: str | None, last: int) -> dict[str, Any]:
    """The newest rollouts, with their decisions. Raises UserError where a route had none."""
    found = read_rollouts(database, route, last=last)
    if route and not found:
        raise UserError(f"{route} was in no rollout; begin one with: tunesmith rollout start")
    return {
        "rollouts": [
            {
                "id": one.id,
                "route": one.route,
                "candidate": one.candidate,
                "artifact": one.artifact,
                "baseline": dict(one.baseline),
                "state": one.state,
                "share_percent": round(100 * one.share, 3) if one.state == "running" else None,
                "started": _moment(one.started_s),
                "changed": _moment(one.changed_s),
                "evidence": asdict(one.evidence),
                "plan": asdict(one.plan),
                "decisions": [
                    {**decision, "at": _moment(decision["at_s"])}
                    for decision in read_decisions(database, one)
                ],
            }
            for one in found
        ]
    }


def show(result: dict[str, Any]) -> RenderableType:
    """One table for each."""
    return Group(*(_table(one) for one in result["rollouts"])) if result["rollouts"] else "none"


def _table(one: dict[str, Any]) -> Any:
    share = "" if one["share_percent"] is None else f" at {one['share_percent']:g} %"
    title = f"Rollout {one['id']}: {one['route']} to {one['candidate']}: {one['state']}{share}"
    rows = []
    for decision in one["decisions"]:
        share = 100 * one["plan"]["shares"][decision["step"]]
        seen = decision["evidence"]
        rows.append(
            (
                decision["at"],
                f"{share:g} %",
                decision["action"],
                decision["reason"],
                f"{seen['requests']:,} / {seen['baseline_requests']:,}",
                f"{seen['errors']:,} / {seen['baseline_errors']:,}",
                f"{seen['slower']:,} of {seen['timed_pairs']:,}",
                f"-{seen['lost']} +{seen['won']} of {seen['probes']}",
                decision["replay"] if isinstance(decision["replay"], str) else "ANOTHER",
            )
        )
    columns = (
        *("at", "share", "decision", "reason", "requests new / old", "errors", "slower"),
        *("probes", "again"),
    )
    return make_table(title, columns, rows)


def _moment(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at_s))
