"""Rollouts of a gateway before upstreams with faults; `tests/benchmarks/rollout.py` plays more."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from gateways import behind, gateway
from rolling import PROBES, Arm, play
from sqlalchemy.exc import OperationalError

from tunesmith.config import DataError, UserError
from tunesmith.config.schema.routes import Rollout
from tunesmith.config.schema.routes import Shadow as ShadowSection
from tunesmith.serve.fleet import Fleet
from tunesmith.serve.rollout.decide import Decision, Plan
from tunesmith.serve.rollout.probes import Probe, read_probes
from tunesmith.serve.rollout.record import read_decisions, read_rollouts, save
from tunesmith.serve.rollout.report import rollout_report, show
from tunesmith.serve.rollout.runner import Rollouts
from tunesmith.serve.routes import Route
from tunesmith.serve.upstream import Load, Upstream

SHORT = Rollout(steps_percent=(20.0, 60.0, 100.0), min_requests=30)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"error_rate": 0.5}, "errors"),
        ({"slowness": 8.0}, "latency"),
        ({"tokens": 50}, "cost"),
        ({"is_wrong": True}, "quality"),
    ],
)
def test_a_worse_arm_is_taken_back(fault: dict[str, Any], reason: str) -> None:
    probes = PROBES if reason == "quality" else ()
    # So long that what a busy machine adds to both does not hide twice the time.
    seconds = 0.05 if reason == "latency" else 0.005
    outcome = asyncio.run(
        play(Arm("old", seconds), Arm("new", seconds, **fault), SHORT, probes=probes)
    )
    assert outcome.rollout.state == "rolled back"
    assert reason in outcome.decisions[-1]["reason"]
    assert {one["replay"] for one in outcome.decisions} == {"the same"}
    assert outcome.rollout.arms == (("old", 1.0),)


def test_an_equal_arm_is_promoted_step_by_step() -> None:
    outcome = asyncio.run(
        play(
            Arm("old", 0.002), Arm("new", 0.002),
            Rollout(steps_percent=(50.0, 100.0), min_requests=20, error_tolerance=0.05),
            probes=PROBES[:3],
        )
    )  # fmt: skip
    assert outcome.rollout.state == "promoted" and outcome.failed == 0
    assert outcome.rollout.arms == (("new", 1.0),)
    assert outcome.decisions[-1]["action"] == "complete"
    assert outcome.rollout.evidence.probes == 3


def test_by_hand_over_a_restart_and_what_is_recorded(tmp_path: Path) -> None:
    plan = Plan.of(SHORT, 0)

    async def story() -> None:
        arms = {name: Arm(name, 0.0) for name in ("old", "new")}
        async with behind(arms["old"].answer) as url:
            for arm in arms.values():
                arm.url = url
            upstreams = {name: Upstream(name, "bot", arm, name) for name, arm in arms.items()}

            def fleet() -> Fleet:
                return Fleet({"bot": Route("bot", (("old", 1.0),))}, upstreams, {})

            first = fleet()
            async with gateway(first, store=tmp_path) as (served, _):
                rollouts = Rollouts(first, served.governance, served.database, plan, ())
                with pytest.raises(UserError, match="answers bot already"):
                    await rollouts.start("bot", "old")
                with pytest.raises(UserError, match="in no rollout"):
                    await rollouts.end("bot", "abort")
                rollout = await rollouts.start("bot", "new")
                assert dict(first.table.routes["bot"].arms) == {"new": 0.2, "old": 0.8}
                rollout.evidence.requests = 7
                save(served.database, rollout)
            second = fleet()
            async with gateway(second, store=tmp_path) as (served, _):
                rollouts = Rollouts(second, served.governance, served.database, plan, ())
                running = asyncio.create_task(rollouts.run())
                while not (taken_up := rollouts.running("bot")):
                    await asyncio.sleep(0.01)
                assert taken_up.evidence.requests == 7
                assert dict(second.table.routes["bot"].arms) == {"new": 0.2, "old": 0.8}
                await rollouts.end("bot", "promote")
                assert second.table.routes["bot"].arms == (("new", 1.0),)
                running.cancel()
                (found,) = read_rollouts(served.database, "bot")
                forged = Decision("roll back", "worse: errors", {})
                save(served.database, found, forged, step=0, evidence=found.evidence)
                report = rollout_report(served.database, "bot", 5)
                show(report)
                replays = [one["replay"] for one in read_decisions(served.database, found)]
                assert replays[-2] == "by hand" and isinstance(replays[-1], dict)
                with pytest.raises(UserError, match="in no rollout"):
                    rollout_report(served.database, "pal", 5)

    asyncio.run(asyncio.wait_for(story(), 20))


def test_shadows_cost_users_nothing_and_are_dropped_when_there_is_no_room() -> None:
    async def story() -> None:
        old, new = Arm("old", 0.0), Arm("new", 0.5, is_wrong=True)
        async with behind(old.answer) as old.url, behind(new.answer) as new.url:
            upstreams = {
                "old": Upstream("old", "bot", old, "checkpoint-old"),
                "new": Upstream("new", "there", new, "checkpoint-new", load=Load(capacity=4)),
            }
            route = Route("bot", (("old", 1.0),), shadow=ShadowSection(upstream="new"))
            async with gateway(Fleet({"bot": route}, upstreams, {})) as (served, client):
                loop = asyncio.get_running_loop()
                started_s = loop.time()
                for _ in range(10):
                    body = {"model": "bot", "prompt": "say", "max_tokens": 5}
                    async with client.post("/v1/completions", json=body) as response:
                        assert (await response.json())["id"] == "old"
                assert loop.time() - started_s < 10 * 0.5 / 2
                while upstreams["new"].open:
                    await asyncio.sleep(0.01)
                lines = served.lines()
                shadows = [line for line in lines if line["purpose"] == "shadow"]
                assert len(lines) == 12 and len(shadows) == 2
                assert {line["arm"] for line in shadows} == {"new"}
                assert {line["experiment"] for line in shadows} == {"shadow of bot"}
                assert all(line["key_id"] is None for line in shadows)
                async with client.get("/metrics") as response:
                    text = await response.text()
                assert 'tunesmith_shadows_dropped_total{route="bot"} 8.0' in text
                assert 'tunesmith_requests_total{ending="complete",status="200"} 10.0' in text

    asyncio.run(asyncio.wait_for(story(), 20))


def test_probes_are_checked_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text(
        '{"prompt": "2+2=", "exact": "4"}\n\n'
        '{"messages": [{"role": "user", "content": "hi"}], "regex": "^[Hh]ello"}\n'
        '{"prompt": "x", "contains": "yes", "max_tokens": 3}\n'
    )
    four, hello, yes = read_probes(path)
    assert four.passes(" 4\n") and not four.passes("44")
    assert hello.passes("Hello") and not hello.passes("oh hello")
    assert yes.passes("oh yes!") and yes.request()[1]["max_tokens"] == 3
    assert hello.request()[0] == "chat/completions"
    for line, words in [
        ('{"prompt": "x"}', "exact, regex and contains"),
        ('{"exact": "x"}', "prompt or messages"),
        ('{"prompt": "x", "exact": "y", "weight": 2}', "weight"),
        ('{"prompt": "x", "regex": "("}', "regex"),
        ("nonsense", "JSON"),
    ]:
        path.write_text(f'{{"prompt": "2+2=", "exact": "4"}}\n{line}\n')
        with pytest.raises(DataError, match=f"probes.jsonl:2: .*{words}"):
            read_probes(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="no probe"):
        read_probes(path)
    with pytest.raises(UserError, match="no such file"):
        read_probes(tmp_path / "none")
    assert read_probes(None) == ()
    assert Probe(prompt="x", exact="y").passes("y")


def test_a_bad_arm_is_left_although_nothing_can_be_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OperationalError("INSERT", {}, OSError("database or disk is full"))

    async def story() -> None:
        arms = {name: Arm(name, 0.0) for name in ("old", "new")}
        upstreams = {name: Upstream(name, "bot", arm, name) for name, arm in arms.items()}
        fleet = Fleet({"bot": Route("bot", (("old", 1.0),))}, upstreams, {})
        async with gateway(fleet) as (served, _):
            plan = Plan.of(SHORT, 0)
            rollouts = Rollouts(fleet, served.governance, served.database, plan, ())
            await rollouts.start("bot", "new")
            monkeypatch.setattr("tunesmith.serve.rollout.runner.save", full)
            running = asyncio.create_task(rollouts.run())
            await asyncio.sleep(1.2)
            rollout = rollouts.running("bot")
            assert rollout and not running.done()
            rollout.evidence.requests = rollout.evidence.errors = 100
            rollout.evidence.baseline_requests = 100
            while rollouts.running("bot"):
                await asyncio.sleep(0.05)
            assert fleet.table.routes["bot"].arms == (("old", 1.0),)
            running.cancel()

    asyncio.run(asyncio.wait_for(story(), 20))
