"""From a recipe to what a gateway serves, and from a name to what it can serve later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.config import ModelError, UserError
from tunesmith.config.schema.routes import Route as RouteSection
from tunesmith.config.schema.routes import Upstream as Section
from tunesmith.config.schema.serve import Serve
from tunesmith.engine import EngineServer, EngineSpec, engine_spec
from tunesmith.ledger import Artifact
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import require_approval
from tunesmith.serve.fleet import EngineHost, Fleet
from tunesmith.serve.govern.measure import Measure
from tunesmith.serve.govern.price import TokenPrice, find_price, given_price
from tunesmith.serve.pins import Pin, pin
from tunesmith.serve.routes import Route
from tunesmith.serve.supervisor import Supervisor
from tunesmith.serve.upstream import Attached, Load, Upstream

_PINS = "adapters"


@dataclass(frozen=True)
class Part:
    """Something that can be made an upstream: an adapter for an engine, or an engine."""

    upstream: Upstream
    host: EngineHost | None = None
    pinned: Pin | None = None
    """Set where it is an adapter; then `host` is the engine that is to hold it."""


class Builder:
    """Makes upstreams out of the recipe's models, artifacts, folders and URLs."""

    def __init__(self, stages: Stages, section: Serve) -> None:
        self._stages, self._section = stages, section
        self._folder = stages.store.folder / "serve"

    def fleet(self) -> Fleet:
        """Everything that the recipe names, nothing of it started."""
        upstreams: dict[str, Upstream] = {}
        engines: dict[str, EngineHost] = {}
        named = self._section.upstreams or {
            self._stages.recipe.name: Section.model_construct(model=self._section.model)
        }
        for name, section in named.items():
            if section.url:
                upstreams[name] = _attached(name, section, self._section)
            elif not section.on:
                part = self.engine(name, section.model, section)
                assert part.host
                upstreams[name], engines[name] = part.upstream, part.host
        for name, section in named.items():
            if section.on and section.adapter:
                part = self.adapter(name, section.adapter, engines[section.on], section)
                assert part.pinned
                hold(part)
                upstreams[name] = part.upstream
        routes = self._section.routes or {name: RouteSection(arms={name: 1.0}) for name in named}
        return Fleet(
            {name: Route.of(name, section) for name, section in routes.items()},
            {name: upstreams[name] for name in named},
            engines,
            declared=frozenset(self._section.upstreams),
        )

    def engine(self, name: str, variant: str | None, section: Section | None = None) -> Part:
        """A model of the recipe on an engine of its own."""
        stages, section = self._stages, section or Section.model_construct()
        variant, draft = stages.variant(variant)
        require_approval(stages, variant)
        spec = replace(engine_spec(stages, variant), served_name=name)
        if section.gpu_memory_utilization:
            settings = {"gpu_memory_utilization": section.gpu_memory_utilization}
            spec = replace(spec, settings=spec.settings.model_copy(update=settings))
        beneath = stages.served_over(variant)
        host = self._host(name, spec, (beneath or draft).id, section)
        price = given_price(section, self._section) or find_price(stages, variant)
        if spec.adapter is None:
            return Part(self._upstream(name, name, host, draft.id, spec, price), host)
        pinned = pin(spec.adapter, (self._folder / _PINS).absolute())
        model = f"{name}@{pinned.hash}"
        server = host.supervisor.server
        server.spec = replace(
            spec,
            chat_template=self._own_copy(spec.chat_template),
            adapter=None,
            adapters={model: pinned.folder},
            adapter_slots=section.adapter_slots,
            served_name=f"{name}.base",
        )
        host.adapters[model] = pinned
        return Part(self._upstream(name, model, host, draft.id, spec, price), host)

    def adapter(
        self, name: str, reference: str, host: EngineHost, section: Section | None = None
    ) -> Part:
        """An adapter by artifact or folder, for the engine of another upstream.

        Raises ModelError where it was trained over another model, or with another chat template
        than the one that the engine speaks.
        """
        folder = Path(reference)
        found = None if folder.is_dir() else self._stages.store.get(reference)
        if found is not None:
            if found.manifest.kind != "adapter":
                raise ModelError(f"{reference} is a {found.manifest.kind}, not an adapter")
            _check_base(found, host)
        source = found.root if found else folder
        pinned = pin(source, (self._folder / _PINS).absolute())
        spec = host.supervisor.server.spec
        if pinned.template is not None and pinned.template != host.template:
            raise ModelError(
                f"{reference} was trained with another chat template than the one that "
                f"{spec.served_name} is served with, so it would answer badly; give it an engine "
                "of its own"
            )
        model = f"{name.partition('@')[0]}@{pinned.hash}"
        price = given_price(section, self._section) or find_price(self._stages, "adapter")
        artifact_id = found.id if found else f"folder:{pinned.hash}"
        upstream = self._upstream(name, model, host, artifact_id, spec, price)
        return Part(upstream, host, pinned)

    def artifact(self, name: str, found: Artifact) -> Part:
        """A whole model by artifact on an engine of its own."""
        if found.manifest.kind not in ("base", "checkpoint"):
            raise ModelError(f"{found.id} is a {found.manifest.kind}, which cannot be served")
        recipe = self._stages.recipe
        spec = EngineSpec(
            model=found.root,
            settings=recipe.engine,
            dtype=recipe.model.dtype,
            served_name=name,
            chat_template=recipe.model.chat_template and recipe.model.chat_template.absolute(),
            seed=recipe.seed,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        host = self._host(name, spec, found.id, Section.model_construct())
        price = given_price(None, self._section)
        return Part(self._upstream(name, name, host, found.id, spec, price), host)

    def resolve(self, fleet: Fleet, route: str, reference: str) -> Part | Upstream:
        """What a rollout names: an upstream that there is, a model of the recipe, an artifact, or
        the folder of an adapter. Adapters go to an engine that runs the model beneath them.

        Raises UserError when it is none of these.
        """
        if there := fleet.table.upstreams.get(reference):
            return there
        stages = self._stages
        if reference in stages.variants:
            variant, draft = stages.variant(reference)
            if beneath := stages.served_over(variant):
                stages.made(draft)
                if part := self._beside(fleet, route, draft.id, beneath.id):
                    return part
            return self.engine(reference, variant)
        if Path(reference).is_dir():
            base, part = None, self._beside(fleet, route, reference, None)
        elif "/" in reference:
            raise UserError(f"{reference}: no such folder")
        else:
            found = stages.store.get(reference)
            if found.manifest.kind != "adapter":
                return self.artifact(found.id, found)
            base = found.manifest.parents.get("base")
            part = self._beside(fleet, route, found.id, base)
        if part:
            return part
        raise UserError(
            f"{reference}: no engine here serves adapters over {base or 'a base'}; serve its "
            "merged model, or another of its adapters from the start"
        )

    def _beside(self, fleet: Fleet, route: str, reference: str, base: str | None) -> Part | None:
        """An adapter on the engine of the route's own arms, else on any that runs its base; None
        where there is none."""
        arms = fleet.table.arms(tuple(name for name, _ in fleet.table.routes[route].arms))
        hosts = [host for arm in arms if (host := fleet.host_of(arm))]
        hosts += [host for host in fleet.engines.values() if host not in hosts]
        for host in hosts:
            if host.supervisor.server.spec.adapter_slots and base in (None, host.model_id):
                part = self.adapter(route, reference, host)
                upstream = replace(part.upstream, name=part.upstream.model)
                return replace(part, upstream=upstream)
        return None

    def _host(self, name: str, spec: EngineSpec, model_id: str, section: Section) -> EngineHost:
        port = self._section.port
        safe = name.replace("/", "_")
        is_sole = name == self._stages.recipe.name and not self._section.upstreams
        named = f"engine-{port}.log" if is_sole else f"engine-{port}-{safe}.log"
        template = spec.chat_template or spec.model / "chat_template.jinja"
        server = EngineServer(spec, log_path=self._folder / named)
        load = Load(capacity=spec.settings.max_num_seqs, most_open=section.max_open_requests)
        return EngineHost(Supervisor(server), load, model_id, _read_template(template, spec.model))

    def _own_copy(self, template: Path | None) -> Path | None:
        """The engine reads its template again when it is started again."""
        if template is None:
            return None
        text = template.read_text(encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        copy = self._folder / _PINS / f"{digest}.jinja"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
        return copy.absolute()

    def _upstream(
        self,
        name: str,
        model: str,
        host: EngineHost,
        artifact_id: str,
        spec: EngineSpec,
        price: TokenPrice | None,
    ) -> Upstream:
        trust = spec.trust_remote_code
        measure = Measure.load(spec.model, spec.chat_template, trust_remote_code=trust)
        return Upstream(
            name, model, host.supervisor, artifact_id, host.load, measure=measure, price=price
        )


def hold(part: Part) -> None:
    """Give an engine that has not been started an adapter to start with."""
    assert part.host and part.pinned
    part.host.supervisor.server.add_adapter(part.upstream.model, part.pinned.folder)
    part.host.adapters[part.upstream.model] = part.pinned


def _attached(name: str, section: Section, serve: Serve) -> Upstream:
    assert section.url and section.model
    headers: Mapping[str, str] = {}
    if section.api_key_env:
        key = os.environ.get(section.api_key_env, "").strip()
        if not key:
            raise UserError(
                f"serve.upstreams.{name}.api_key_env: the environment variable "
                f"{section.api_key_env} is not set"
            )
        headers = {"Authorization": f"Bearer {key}"}
    return Upstream(
        name,
        section.model,
        Attached(name, section.url, headers),
        f"{section.url.partition('://')[2]}:{section.model}",
        Load(capacity=section.max_open_requests or 64, most_open=section.max_open_requests),
        headers,
        price=given_price(section, serve),
        is_vllm=False,
        max_model_len=section.max_model_len,
    )


def _read_template(path: Path, model: Path) -> str | None:
    """The template of a file, else the one in the tokenizer's configuration."""
    if path.is_file():
        return path.read_text(encoding="utf-8")
    config = model / "tokenizer_config.json"
    found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    template = found.get("chat_template")
    return template if isinstance(template, str) else None


def _check_base(adapter: Artifact, host: EngineHost) -> None:
    base = adapter.manifest.parents.get("base")
    if base != host.model_id:
        raise ModelError(
            f"{adapter.id} was trained over {base}, and the engine runs {host.model_id}"
        )
