"""What is kept of routes and rollouts: enough to go on after a restart, and to decide again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import Engine

from tunesmith.serve.fleet import Arms
from tunesmith.serve.govern.database import brought, decisions, rollouts, routing
from tunesmith.serve.rollout.decide import Decision, Evidence, Plan, decide

State = Literal["running", "promoted", "rolled back", "aborted"]


@dataclass
class Rollout:
    """One rollout as far as it is."""

    id: int
    route: str
    candidate: str
    artifact: str
    baseline: Arms
    plan: Plan
    step: int
    state: State
    evidence: Evidence
    started_s: float
    changed_s: float

    @property
    def share(self) -> float:
        """What the candidate gets of the route now."""
        return self.plan.shares[self.step]

    @property
    def arms(self) -> Arms:
        """The route as it is to be in this state."""
        match self.state:
            case "promoted":
                return ((self.candidate, 1.0),)
            case "running":
                total = sum(weight for _, weight in self.baseline)
                rest = 1.0 - self.share
                old = tuple((name, weight / total * rest) for name, weight in self.baseline)
                # First, so that who is drawn to it stays there while its share grows.
                return ((self.candidate, self.share), *(old if rest else ()))
            case _:
                return self.baseline


def start_rollout(
    engine: Engine, route: str, candidate: str, artifact: str, baseline: Arms, plan: Plan
) -> Rollout:
    """Record a new one."""
    now_s = time.time()
    values = {
        "route": route,
        "candidate": candidate,
        "artifact": artifact,
        "baseline": [list(arm) for arm in baseline],
        "plan": asdict(plan),
        "step": 0,
        "state": "running",
        "evidence": asdict(Evidence()),
        "started_s": now_s,
        "changed_s": now_s,
    }
    with engine.begin() as db:
        key = db.execute(rollouts.insert().values(values)).inserted_primary_key
        assert key
        return _rollout({"id": key[0], **values})


def read_rollouts(
    engine: Engine, route: str | None = None, state: str | None = None, last: int | None = None
) -> list[Rollout]:
    """Newest first."""
    query = sa.select(rollouts).order_by(rollouts.c.id.desc())
    if route:
        query = query.where(rollouts.c.route == route)
    if state:
        query = query.where(rollouts.c.state == state)
    with engine.connect() as db:
        return [_rollout(dict(row)) for row in db.execute(query.limit(last)).mappings()]


def save(
    engine: Engine,
    rollout: Rollout,
    decision: Decision | None = None,
    *,
    step: int = 0,
    evidence: Evidence | None = None,
) -> None:
    """Where a rollout stands, and the decision in `step` that brought it there with the evidence
    that it was made from, at once."""
    values: dict[str, Any] = {
        "step": rollout.step,
        "state": rollout.state,
        "evidence": asdict(rollout.evidence),
    }
    with engine.begin() as db:
        if decision:
            values["changed_s"] = time.time()
            db.execute(
                decisions.insert().values(
                    rollout=rollout.id,
                    at_s=values["changed_s"],
                    step=step,
                    action=decision.action,
                    reason=decision.reason,
                    signals=decision.signals,
                    evidence=asdict(evidence or rollout.evidence),
                )
            )
        db.execute(rollouts.update().where(rollouts.c.id == rollout.id).values(values))


def read_decisions(engine: Engine, rollout: Rollout) -> list[dict[str, Any]]:
    """Every recorded decision, and whether its evidence gives it again."""
    query = sa.select(decisions).where(decisions.c.rollout == rollout.id).order_by(decisions.c.seq)
    with engine.connect() as db:
        found = [dict(row) for row in db.execute(query).mappings()]
    for one in found:
        again = decide(rollout.plan, one["step"], Evidence(**one["evidence"]))
        by_hand = one["action"] in ("promote", "abort")
        is_same = (again.action, again.reason, again.signals) == (
            one["action"],
            one["reason"],
            one["signals"],
        )
        one["replay"] = "by hand" if by_hand else "the same" if is_same else again.as_dict()
    return found


def save_routing(engine: Engine, route: str, arms: Arms, declared: Any) -> None:
    """Where a route was moved to, for the next start."""
    row = insert(routing).values(
        route=route, arms=[list(arm) for arm in arms], declared=declared, at_s=time.time()
    )
    changed = {name: row.excluded[name] for name in ("arms", "declared", "at_s")}
    with engine.begin() as db:
        db.execute(row.on_conflict_do_update(index_elements=["route"], set_=changed))


def read_routing(engine: Engine, declared: Mapping[str, Any]) -> dict[str, Arms]:
    """Routes that were moved since their recipe came to say what it says."""
    with engine.connect() as db:
        rows = db.execute(sa.select(routing)).all()
    return {
        row.route: tuple((name, weight) for name, weight in row.arms)
        for row in rows
        if row.route in declared and declared[row.route] == row.declared
    }


def save_brought(engine: Engine, name: str, route: str, reference: str, artifact: str) -> None:
    """What an upstream of no recipe is made of."""
    row = insert(brought).values(name=name, route=route, reference=reference, artifact=artifact)
    changed = {key: row.excluded[key] for key in ("route", "reference", "artifact")}
    with engine.begin() as db:
        db.execute(row.on_conflict_do_update(index_elements=["name"], set_=changed))


def read_brought(engine: Engine) -> dict[str, Any]:
    """All of them by name."""
    with engine.connect() as db:
        return {row.name: row for row in db.execute(sa.select(brought))}


def _rollout(row: Mapping[str, Any]) -> Rollout:
    baseline = tuple((name, weight) for name, weight in row["baseline"])
    return Rollout(
        **{
            **row,
            "baseline": baseline,
            "plan": Plan.read(row["plan"]),
            "evidence": Evidence(**row["evidence"]),
        }
    )
