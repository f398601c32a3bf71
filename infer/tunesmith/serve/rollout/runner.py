"""Rollouts of a running gateway: what both arms do is counted, and decided on twice a second."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from tunesmith.config import UserError
from tunesmith.serve.client import Client
from tunesmith.serve.fleet import Fleet
from tunesmith.serve.govern.governance import Governance, Visit
from tunesmith.serve.govern.journal import Entry
from tunesmith.serve.rollout.decide import Decision, Evidence, Plan, decide
from tunesmith.serve.rollout.probes import Probe, passes
from tunesmith.serve.rollout.record import Rollout, read_rollouts, save, start_rollout
from tunesmith.terminal import log

_INTERVAL_S = 0.5
_UNPAIRED = 64


@dataclass
class _Live:
    """A rollout, with the answers that wait for one of the other arm."""

    rollout: Rollout
    waiting: dict[bool, deque[tuple[float, int | None]]] = field(
        default_factory=lambda: {is_new: deque(maxlen=_UNPAIRED) for is_new in (True, False)}
    )
    """Seconds and nano-USD, by whether it is the new arm's."""

    last_reason: str = ""
    saved: Evidence | None = None

    def count(self, *, is_new: bool, is_error: bool) -> None:
        evidence = self.rollout.evidence
        if is_new:
            evidence.requests += 1
            evidence.errors += is_error
        else:
            evidence.baseline_requests += 1
            evidence.baseline_errors += is_error

    def pair(self, *, is_new: bool, taken_s: float, nano_usd: int | None) -> None:
        """Set an answer beside the other arm's latest that has no partner yet."""
        others = self.waiting[not is_new]
        if not others:
            self.waiting[is_new].append((taken_s, nano_usd))
            return
        mine, other = (taken_s, nano_usd), others.pop()
        (new_s, new_usd), (old_s, old_usd) = (mine, other) if is_new else (other, mine)
        plan, evidence = self.rollout.plan, self.rollout.evidence
        evidence.timed_pairs += 1
        evidence.slower += new_s > old_s * (1.0 + (plan.latency_tolerance or 0.0))
        if new_usd is not None and old_usd is not None:
            evidence.priced_pairs += 1
            evidence.dearer += new_usd > old_usd * (1.0 + (plan.cost_tolerance or 0.0))


class Rollouts:
    """Lives on the gateway's event loop."""

    def __init__(
        self,
        fleet: Fleet,
        governance: Governance,
        database: Engine,
        plan: Plan,
        probes: tuple[Probe, ...],
    ) -> None:
        self._fleet, self._governance, self._database = fleet, governance, database
        self._plan, self._probes = plan, probes
        self.on_move: Callable[[str], None] = lambda _: None
        """Told of routes that were moved, in a thread."""
        self._live: dict[str, _Live] = {}
        governance.observers.append(self._observe)

    async def run(self) -> None:
        """Take up what was running when the gateway was stopped, and go on until cancelled."""
        for rollout in await asyncio.to_thread(read_rollouts, self._database, None, "running"):
            live = _Live(rollout)
            if self._is_there(rollout):
                self._live[rollout.route] = live
                self._fleet.move(rollout.route, rollout.arms)
            elif rollout.route in self._fleet.table.routes:
                rollout.state = "aborted"
                gone = Decision("abort", "an arm of it is gone")
                await asyncio.to_thread(save, self._database, rollout, gone, step=rollout.step)
        async with Client() as client:
            probing = asyncio.create_task(self._ask_probes(client))
            try:
                while True:
                    await asyncio.sleep(_INTERVAL_S)
                    for live in list(self._live.values()):
                        try:
                            await self._look(live)
                        except DBAPIError as error:  # a full disk must not keep a bad arm
                            log(f"serve: rollout {live.rollout.id}: not recorded: {error.orig}")
            finally:
                probing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await probing

    def running(self, route: str) -> Rollout | None:
        """The rollout that a route is in."""
        live = self._live.get(route)
        return live.rollout if live else None

    async def start(self, route: str, candidate: str) -> Rollout:
        """Give an upstream that answers its first share of a route."""
        baseline = self._fleet.table.routes[route].arms
        if candidate in (name for name, _ in baseline):
            raise UserError(f"{candidate} answers {route} already")
        artifact = self._fleet.table.upstreams[candidate].artifact_id
        rollout = await asyncio.to_thread(
            start_rollout, self._database, route, candidate, artifact, baseline, self._plan
        )
        self._live[route] = _Live(rollout)
        self._fleet.move(route, rollout.arms)
        await asyncio.to_thread(self.on_move, route)
        return rollout

    async def end(self, route: str, action: Literal["promote", "abort"]) -> Rollout:
        """What a person decides. Raises UserError where there is no rollout."""
        live = self._live.get(route)
        if live is None:
            raise UserError(f"{route} is in no rollout")
        live.rollout.state = "promoted" if action == "promote" else "aborted"
        seen = replace(live.rollout.evidence)
        await self._apply(live, Decision(action, "by hand"), live.rollout.step, seen)
        return live.rollout

    def _is_there(self, rollout: Rollout) -> bool:
        table = self._fleet.table
        names = {rollout.candidate, *(name for name, _ in rollout.baseline)}
        return rollout.route in table.routes and names <= {*table.upstreams}

    def _observe(self, visit: Visit, entry: Entry) -> None:
        """Count a client's request for the arm that was drawn for it, whoever answered at last."""
        live = self._live.get(visit.route or "")
        if live is None or visit.first is None or visit.purpose != "request":
            return
        is_new = visit.first.name == live.rollout.candidate
        if not is_new and visit.first.name not in dict(live.rollout.baseline):
            return
        is_error = bool(visit.failures) or entry.ending in ("error", "lost")
        if not is_error and entry.ending != "complete":
            return  # refused, or left: neither is the arm's doing
        live.count(is_new=is_new, is_error=is_error)
        if not is_error and visit.sent_s is not None:
            taken_s = visit.started_s + visit.duration_s - visit.sent_s
            live.pair(is_new=is_new, taken_s=taken_s, nano_usd=entry.nano_usd)

    async def _look(self, live: _Live) -> None:
        rollout, step = live.rollout, live.rollout.step
        seen = replace(rollout.evidence)
        decision = decide(rollout.plan, step, seen)
        match decision.action:
            case "roll back":
                rollout.state = "rolled back"
            case "complete":
                rollout.state, rollout.step = "promoted", len(rollout.plan.shares) - 1
            case "advance":
                rollout.step, rollout.evidence = step + 1, seen.next_step()
                for queue in live.waiting.values():
                    queue.clear()
            case _:
                await self._hold(live, decision, seen)
                return
        await self._apply(live, decision, step, seen)

    async def _hold(self, live: _Live, decision: Decision, seen: Evidence) -> None:
        """Holding on for another reason than before is a decision to record; counts are kept for a
        restart."""
        is_news = decision.reason != live.last_reason
        if is_news or seen != live.saved:
            live.last_reason, live.saved = decision.reason, seen
            kept = decision if is_news else None
            rollout = live.rollout
            await asyncio.to_thread(
                save, self._database, rollout, kept, step=rollout.step, evidence=seen
            )

    async def _apply(self, live: _Live, decision: Decision, step: int, seen: Evidence) -> None:
        """Move first: a bad arm is left before the record of it is written."""
        rollout, live.last_reason = live.rollout, ""
        if rollout.state != "running":
            self._live.pop(rollout.route, None)
        self._fleet.move(rollout.route, rollout.arms)
        share = f"{rollout.share:.0%}" if rollout.state == "running" else rollout.state
        log(f"serve: rollout {rollout.id} of {rollout.route}: {share}: {decision.reason}")
        await asyncio.to_thread(save, self._database, rollout, decision, step=step, evidence=seen)
        await asyncio.to_thread(self.on_move, rollout.route)

    async def _ask_probes(self, client: Client) -> None:
        """One question after another, to both arms, while both have room to spare."""
        while True:
            asked = False
            for live in list(self._live.values()):
                asked = await self._probe(client, live) or asked
            if not asked:
                await asyncio.sleep(_INTERVAL_S / 5)

    async def _probe(self, client: Client, live: _Live) -> bool:
        rollout, table = live.rollout, self._fleet.table
        at = rollout.evidence.probes
        if at >= min(rollout.plan.probes, len(self._probes)):
            return False
        names = (rollout.candidate, rollout.baseline[0][0])
        arms = [table.upstreams[name] for name in names if name in table.upstreams]
        if len(arms) < len(names) or not all(arm.has_spare for arm in arms):
            return False
        new, old = [
            await passes(
                client,
                self._governance,
                self._probes[at],
                arm,
                route=rollout.route,
                experiment=f"rollout {rollout.id}",
            )
            for arm in arms
        ]
        evidence = rollout.evidence
        evidence.probes += 1
        evidence.lost += old and not new
        evidence.won += new and not old
        return True
