"""Which upstream answers a request. Pure."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from tunesmith.config.schema import routes as schema
from tunesmith.serve.upstream import Upstream

_POINTS = 2.0**64


@dataclass(frozen=True)
class Route:
    """One model name, with the upstreams behind it."""

    name: str
    arms: tuple[tuple[str, float], ...]
    """Upstreams and their weights. Who is drawn to the first arm stays there while its share
    grows, so that a rollout sends nobody to and fro."""

    sticky: str = "user"
    fallback: tuple[str, ...] = ()
    timeout_s: float | None = None
    shadow: schema.Shadow | None = None

    @classmethod
    def of(cls, name: str, section: schema.Route) -> Route:
        """As the recipe has it."""
        return cls(
            name,
            tuple(section.arms.items()),
            section.sticky,
            section.fallback,
            section.timeout_s,
            section.shadow,
        )

    @cached_property
    def _ends(self) -> tuple[float, ...]:
        total = sum(weight for _, weight in self.arms)
        return tuple(
            itertools.accumulate(weight / total for _, weight in self.arms),
        )

    def choose(self, identity: str | None) -> str:
        """The arm of somebody, the same each time; a random one for nobody."""
        if len(self.arms) == 1:
            return self.arms[0][0]
        point = random.random() if identity is None else _point(self.name, identity)
        for (name, _), end in zip(self.arms, self._ends, strict=True):
            if point < end:
                return name
        return self.arms[-1][0]

    def order(self, chosen: str) -> tuple[str, ...]:
        """Whom to ask, one after another."""
        if not self.fallback:
            return (chosen,)
        return (chosen, *(name for name in self.fallback if name != chosen))

    @property
    def members(self) -> set[str]:
        """Every upstream that it may ask."""
        names = {*(name for name, _ in self.arms), *self.fallback}
        return names | ({self.shadow.upstream} if self.shadow else set())


@dataclass(frozen=True)
class Table:
    """All routes and upstreams at one moment; a request holds on to the one it began with."""

    routes: Mapping[str, Route] = field(default_factory=dict)
    upstreams: Mapping[str, Upstream] = field(default_factory=dict)

    def find(self, model: str | None) -> Route | None:
        """The route that a request asks for; the first where it names none."""
        if model is None:
            return next(iter(self.routes.values()), None)
        return self.routes.get(model)

    def arms(self, names: tuple[str, ...]) -> list[Upstream]:
        """Upstreams by name."""
        return [self.upstreams[name] for name in names]

    @cached_property
    def sole(self) -> Upstream | None:
        """The only upstream, where there is only one."""
        return next(iter(self.upstreams.values())) if len(self.upstreams) == 1 else None

    def is_ready(self, route: Route) -> bool:
        """Whether anybody is there to answer."""
        names = (*(name for name, _ in route.arms), *route.fallback)
        return any(self.upstreams[name].place.is_ready for name in names)


class Tables(Protocol):
    """Whoever moves routes."""

    @property
    def table(self) -> Table:
        """Where requests that begin now go."""
        ...


def _point(route: str, identity: str) -> float:
    digest = hashlib.blake2b(f"{route}\0{identity}".encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / _POINTS
