"""What people ask of a running gateway, passed on through its database.

A command is a row that the gateway with that route takes, does, and answers. Whoever may write to
the store may steer it, and nobody else; a gateway that is not running misses nothing by it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from tunesmith.config import TunesmithError, UserError
from tunesmith.serve.build import Builder, Part, hold
from tunesmith.serve.fleet import Fleet
from tunesmith.serve.govern.database import commands
from tunesmith.serve.rollout.record import (
    read_brought,
    read_routing,
    save_brought,
    save_routing,
)
from tunesmith.serve.rollout.runner import Rollouts
from tunesmith.serve.upstream import Upstream
from tunesmith.terminal import log

What = Literal["swap", "start", "promote", "abort"]
_INTERVAL_S = 0.3
_TAKEN_WITHIN_S = 5.0


class Control:
    """The gateway's side of it."""

    def __init__(
        self, fleet: Fleet, builder: Builder, database: Engine, rollouts: Rollouts
    ) -> None:
        self._fleet, self._builder, self._database = fleet, builder, database
        self._rollouts = rollouts
        self._declared = {
            name: {
                arm: [weight, fleet.table.upstreams[arm].artifact_id] for arm, weight in one.arms
            }
            for name, one in fleet.table.routes.items()
        }
        rollouts.on_move = self.keep
        self._open: set[asyncio.Task[None]] = set()
        self._busy: set[str] = set()

    def restore(self) -> None:
        """Lead routes to where they were led before the gateway was stopped; before any engine is
        started."""
        with self._database.begin() as db:
            db.execute(
                commands.update()
                .where(commands.c.state == "running", commands.c.route.in_(self._declared))
                .values(state="failed", message="the gateway was stopped meanwhile")
            )
        known = read_brought(self._database)
        for route, arms in read_routing(self._database, self._declared).items():
            try:
                for name, _ in arms:
                    if name not in self._fleet.table.upstreams:
                        self._bring_back(route, known[name])
            except (TunesmithError, KeyError) as error:
                log(f"serve: {route} is where the recipe has it: its last arm is gone: {error}")
                continue
            self._fleet.move(route, arms)

    async def run(self) -> None:
        """Do what is asked until cancelled."""
        await self._fleet.sweep()
        rolling = asyncio.create_task(self._rollouts.run())
        try:
            while True:
                try:
                    found = await asyncio.to_thread(_take, self._database, [*self._declared])
                except DBAPIError as error:
                    log(f"serve: commands cannot be read: {error.orig}")
                    found = []
                for row in found:
                    task = asyncio.create_task(self._answer(row))
                    self._open.add(task)
                    task.add_done_callback(self._open.discard)
                if not self._busy:
                    await self._fleet.sweep()
                if rolling.done():
                    rolling.result()
                await asyncio.sleep(_INTERVAL_S)
        finally:
            for task in (rolling, *self._open):
                task.cancel()

    def keep(self, route: str) -> None:
        """Note where a route leads now, for the next start."""
        arms, declared = self._fleet.table.routes[route].arms, self._declared[route]
        save_routing(self._database, route, arms, declared)

    async def _answer(self, row: Any) -> None:
        try:
            if row.route in self._busy:
                raise UserError(f"{row.route} is being moved already; try again when that is done")
            self._busy.add(row.route)
            try:
                state, message = "done", await self._do(row.what, row.route, row.target)
            finally:
                self._busy.discard(row.route)
        except TunesmithError as error:
            state, message = "failed", str(error)
        except Exception as error:
            state, message = "failed", f"a fault in the gateway: {type(error).__name__}: {error}"
            log(f"serve: {row.what} {row.route}: {message}")
        await asyncio.to_thread(_settle, self._database, row.seq, state, message)

    async def _do(self, what: What, route: str, target: str | None) -> str:
        if what in ("promote", "abort"):
            ended = await self._rollouts.end(route, "promote" if what == "promote" else "abort")
            return f"rollout {ended.id} of {route} is {ended.state}"
        if running := self._rollouts.running(route):
            raise UserError(f"{route} is in rollout {running.id}; promote or abort that first")
        assert target
        name = await self._bring(route, target)
        if what == "start":
            rollout = await self._rollouts.start(route, name)
            return f"rollout {rollout.id}: {rollout.share:.0%} of {route} to {name}"
        self._fleet.move(route, ((name, 1.0),))
        await asyncio.to_thread(self.keep, route)
        return f"{route} is answered by {name}"

    async def _bring(self, route: str, target: str) -> str:
        """Have what a command names answer; returns what it is called."""
        found = await asyncio.to_thread(self._builder.resolve, self._fleet, route, target)
        if isinstance(found, Upstream):
            if not found.place.is_ready:
                raise UserError(f"{found.name} does not answer")
            return found.name
        assert found.host
        upstream, reference = found.upstream, target
        if found.pinned:
            await self._fleet.add_adapter(found.host, upstream, found.pinned)
            # The copy, which stays when the original goes.
            reference = str(found.pinned.folder)
        else:
            log(f"serve: loading {upstream.name} ({upstream.artifact_id}) beside what is served")
            await self._fleet.add_engine(found.host, upstream)
        await asyncio.to_thread(
            save_brought, self._database, upstream.name, route, reference, upstream.artifact_id
        )
        return upstream.name

    def _bring_back(self, route: str, row: Any) -> None:
        part = self._builder.resolve(self._fleet, route, row.reference)
        assert isinstance(part, Part) and part.host
        part.upstream.artifact_id = row.artifact
        if part.pinned:
            hold(part)
        else:
            self._fleet.engines[part.upstream.name] = part.host
        self._fleet.include(part.upstream)


def ask_gateway(
    engine: Engine,
    route: str,
    what: What,
    target: str | None = None,
    *,
    on_wait: Callable[[], None] = lambda: None,
) -> str:
    """Have a running gateway do something; returns what it says.

    Raises UserError when no gateway has the route, or it refuses.
    """
    with engine.begin() as db:
        row = commands.insert().values(
            at_s=time.time(), route=route, what=what, target=target, state="pending"
        )
        key = db.execute(row).inserted_primary_key
        assert key
    asked_s = time.monotonic()
    while True:
        with engine.connect() as db:
            found = db.execute(sa.select(commands).where(commands.c.seq == key[0])).one()
        if found.state == "done":
            return str(found.message)
        if found.state == "failed":
            raise UserError(str(found.message))
        if found.state == "pending" and time.monotonic() - asked_s > _TAKEN_WITHIN_S:
            if _claim(engine, key[0], "withdrawn"):
                raise UserError(
                    f"no gateway that is ready over this store has a route {route!r}; start one "
                    "with tunesmith serve, or name its store with --store"
                )
        elif found.state == "running":
            on_wait()
        time.sleep(_INTERVAL_S)


def _take(engine: Engine, routes: list[str]) -> list[Any]:
    """Commands for these routes, each taken by one gateway alone."""
    query = sa.select(commands).where(commands.c.state == "pending", commands.c.route.in_(routes))
    with engine.connect() as db:
        found = db.execute(query.order_by(commands.c.seq)).all()
    return [row for row in found if _claim(engine, row.seq, "running")]


def _claim(engine: Engine, seq: int, state: str) -> bool:
    with engine.begin() as db:
        row = commands.update().where(commands.c.seq == seq, commands.c.state == "pending")
        return db.execute(row.values(state=state)).rowcount == 1


def _settle(engine: Engine, seq: int, state: str, message: str) -> None:
    with engine.begin() as db:
        db.execute(
            commands.update().where(commands.c.seq == seq).values(state=state, message=message)
        )
