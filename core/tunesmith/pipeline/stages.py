"""What each section of a recipe makes: every artifact's id, known before any work is done.

Every command computes the ids it needs from the recipe alone, so that stages exchange artifacts
and never code. A change here that alters what the same recipe means must raise `_REVISION`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tunesmith.config import ModelError, Recipe, UserError, load_recipe, require
from tunesmith.config.schema.base import Section
from tunesmith.config.schema.quantize import AUTO
from tunesmith.ledger import Artifact, Draft, Store, describe_environment
from tunesmith.pipeline.batch import adapter_of, digest_adapter, digest_batch
from tunesmith.pipeline.bench import bench_inputs, bench_section
from tunesmith.pipeline.sources import BUILTIN_BASE, digest_data, hub_commit, source_names

_REVISION = 1
_LATER_ENGINE_KEYS = (
    "max_num_batched_tokens", "enable_chunked_prefill", "enable_prefix_caching", "kv_cache_dtype",
)  # fmt: skip
_RECOVER = "+recover"
# The keys of `batch` that decide the answers.
_BATCH_ANSWERS = (
    *("format", "split", "subset", "task", "id_column", "prompt", "messages", "system", "raw"),
    *("labels", "completion", "structured", "n", "max_tokens", "temperature", "top_p", "stop"),
    "adapters",
)


class Stages:
    """The artifacts of one recipe, made or not."""

    def __init__(self, recipe: Recipe, store: Store | None = None, path: str = "RECIPE") -> None:
        self.recipe = recipe
        self.store = store or Store.of(recipe)
        self.path = path

    @cached_property
    def dataset(self) -> Draft:
        """Rows of `data`, read, checked and split."""
        data = self.recipe.data
        if data is None:
            raise UserError(f"{self.path}: this needs a data section")
        inputs = {
            name: digest_data(self.store, source.source, source.revision)
            for name, source in zip(source_names(data), data.sources, strict=True)
        }
        if data.evaluation:
            inputs["evaluation"] = digest_data(self.store, data.evaluation, data.revision)
        names = ("format", "evaluation_fraction", "max_rows", "max_error_rate")
        section = {
            # Only where it is not the default, so that data sets made before keep their ids.
            "data": _pick(data, *names, *(("learn",) if data.learn != "all" else ())),
            "builtin": any(source.source.startswith("builtin/") for source in data.sources),
            "seed": self.recipe.seed,
        }
        if not isinstance(data.train, str):
            section["sources"] = [_pick(source, "format", "weight") for source in data.sources]
        return self._draft("dataset", "data", section, inputs=inputs)

    @cached_property
    def base(self) -> Draft:
        """The model that training starts from."""
        source = self.recipe.model.base
        if source is None:
            raise UserError(f"{self.path}: a recipe that pre-trains has no base")
        if self.builds_base:
            return self.builtin_base.trained
        if source.startswith("builtin/"):
            raise ModelError(f"model.base: no such builtin {source}; there is {BUILTIN_BASE}")
        folder = Path(source)
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ModelError(f"model.base: {source} has no config.json; it is not a model")
            section: dict[str, Any] = {"source": "folder"}
            return self._draft("base", "base", section, inputs=self.store.digest_folder(folder))
        if source.startswith(("base-", "checkpoint-")):
            return Draft.of(self.store.get(source).manifest)
        if folder.is_absolute() or source.startswith("."):
            raise ModelError(f"model.base: no such folder: {source}")
        commit = hub_commit(source, self.recipe.model.revision, "model")
        return self._draft("base", "base", {"source": source, "commit": commit})

    @cached_property
    def builtin_base(self) -> Stages:
        """The stages of the recipe that pre-trains `builtin/tiny-llama`, in the same store."""
        path = builtin_recipe("tiny-llama")
        recipe = load_recipe(path).model_copy(update={"store": self.recipe.store})
        return Stages(recipe, self.store, str(path))

    @property
    def trained_over(self) -> Draft:
        """What the adapter is fitted to and served over: the base, or its quantized form."""
        over = self.recipe.train.over if self.recipe.train else None
        return self.quantized(over) if over else self.base

    @property
    def builds_base(self) -> bool:
        """Whether the base is one that Tunesmith pre-trains itself."""
        return self.recipe.model.base == BUILTIN_BASE

    @cached_property
    def trained(self) -> Draft:
        """What the training loop itself writes: an adapter, a checkpoint, or a new base."""
        train = self.recipe.train
        if train is None:
            raise UserError(f"{self.path}: this needs a train section")
        unused = () if train.method in ("lora", "qlora") else ("lora",)
        section = {
            "train": _drop(
                train,
                *("merge", "save_steps", "logging_steps", "report_to", "sharding"),
                *("per_device_eval_batch_size", "torch_compile", "preflight"),
                "over",  # the base among the parents says it
                *unused,
            ),
            "model": _pick(self.recipe.model, "dtype"),
            "data": _pick(self.recipe.data, "max_length", "truncation") if self.recipe.data else {},
            "seed": self.recipe.seed,
        }
        parents = {"data": self.dataset.id}
        if train.method == "pretrain":
            return self._draft("base", "base", section, self._template, parents)
        parents["base"] = self.trained_over.id
        if train.method == "full":
            return self._draft("checkpoint", "tuned", section, self._template, parents)
        return self._draft("adapter", "adapter", section, self._template, parents)

    @cached_property
    def tuned(self) -> Draft:
        """A whole model with the training in it: the merged adapter, or what was trained."""
        if self.trained.kind != "adapter":
            return self.trained
        section = {"merge": _pick(self.recipe.model, "dtype")}
        parents = {"adapter": self.trained.id, "base": self.base.id}
        return self._draft("checkpoint", "tuned", section, parents=parents)

    @property
    def unquantized(self) -> Draft:
        """The model that is quantized: the tuned one, unless the training is over what it makes."""
        return self.tuned if self.unquantized_name == "tuned" else self.base

    @property
    def unquantized_name(self) -> str:
        """The name of that model among the variants."""
        train = self.recipe.train
        return "tuned" if train and not train.over else "base"

    def quantized(self, scheme: str) -> Draft:
        """One compressed checkpoint."""
        quantize, data = self.recipe.quantize, self.recipe.data
        if quantize is None or data is None:
            raise UserError(f"{self.path}: this needs quantize and data sections")
        # Only where they decide something, so that checkpoints made before keep their ids.
        is_cut_otherwise = data.truncation != "end" and quantize.calibrates(scheme)
        section = {
            "quantize": {
                "scheme": scheme,
                **_pick(quantize, "calibration_rows"),
                **quantize.choices(scheme),
            },
            "model": _pick(self.recipe.model, "dtype"),
            "data": _pick(data, "max_length", *(("truncation",) if is_cut_otherwise else ())),
            "seed": self.recipe.seed,
        }
        if scheme == AUTO and quantize.device is None:
            section["machine"] = self._machine
        parents = {"parent": self.unquantized.id, "calibration": self.dataset.id}
        return self._draft("checkpoint", scheme, section, self._calibration_inputs(scheme), parents)

    def _calibration_inputs(self, scheme: str) -> dict[str, str]:
        """Digests of what a checkpoint is made from beside its parents."""
        quantize = self.recipe.quantize
        assert quantize
        text = quantize.calibration_text
        if isinstance(text, str) or not quantize.calibrates(scheme):
            return self._template
        if not text.is_file():
            raise UserError(f"{self.path}: quantize.calibration_text: no such file: {text}")
        return {**self._template, "calibration_text": self.store.digest(text)}

    def with_schemes(self, *schemes: str, keep: tuple[str, ...] = ()) -> Stages:
        """The stages of the same recipe with these schemes named in place of its own."""
        quantize = self.recipe.quantize
        assert quantize
        named = {"scheme": schemes, "keep": (*quantize.keep, *keep)}
        recipe = self.recipe.model_copy(update={"quantize": quantize.model_copy(update=named)})
        return Stages(recipe, self.store, self.path)

    def fidelity(self, scheme: str) -> Draft:
        """What a compressed checkpoint keeps of its parent, measured in the engine.

        The limits of the gate are not part of it: another limit needs no other measurement. That of
        `auto` is the one of the checkpoint that was chosen, once there is one.
        """
        checkpoint = self.quantized(scheme)
        if scheme == AUTO and (made := self.store.find(checkpoint.id)):
            return Draft.of(self.store.get(made.manifest.metrics["fidelity"]).manifest)
        quantize, data, evaluate = self.recipe.quantize, self.recipe.data, self.recipe.evaluate
        assert quantize and data
        section = {
            "fidelity": _pick(quantize, "verify_rows"),
            "evaluate": _pick(evaluate, "tasks", "max_tokens") if evaluate else {},
            "engine": self._engine,
            "data": _pick(data, "max_length"),
            "seed": self.recipe.seed,
        }
        parents = {
            "checkpoint": checkpoint.id,
            "parent": checkpoint.parents["parent"],
            "data": self.dataset.id,
        }
        return self._draft("eval", f"fidelity {scheme}", section, self._template, parents)

    @property
    def fidelities(self) -> list[Draft]:
        """Those of all checkpoints; none where the recipe leaves them unverified."""
        quantize = self.recipe.quantize
        if quantize is None or not quantize.verify_rows:
            return []
        return [self.fidelity(scheme) for scheme in self.schemes]

    def calibration_file(self, scheme: str) -> Path:
        """Where the tokens that a checkpoint was calibrated on are kept, for its verification.

        They are training data, so they are no part of the folder that is delivered.
        """
        return self.store.folder / "cache" / "calibration" / f"{self.quantized(scheme).id}.json"

    def recovered(self, scheme: str) -> Draft:
        """The adapter over one compressed checkpoint that is distilled from its parent."""
        quantize, data = self.recipe.quantize, self.recipe.data
        assert quantize and quantize.recover and data
        section = {
            "recover": _drop(quantize.recover, "schemes", "gradient_checkpointing"),
            "start": "mended",
            "model": _pick(self.recipe.model, "dtype"),
            "data": _pick(data, "max_length", "truncation"),
            "seed": self.recipe.seed,
        }
        parents = {
            "base": self.quantized(scheme).id,
            "teacher": self.unquantized.id,
            "data": self.dataset.id,
        }
        return self._draft("adapter", f"recover {scheme}", section, self._template, parents)

    @cached_property
    def schemes(self) -> tuple[str, ...]:
        """The schemes of `quantize`, in the recipe's order."""
        return self.recipe.quantize.schemes if self.recipe.quantize else ()

    @cached_property
    def variants(self) -> dict[str, Draft]:
        """Every servable model of the recipe by name, from the least to the most processed.

        Adapters are served as a LoRA over another model; see `served_over`.
        """
        recipe, train = self.recipe, self.recipe.train
        found: dict[str, Draft] = {}
        if not train or train.method != "pretrain":
            found["base"] = self.base
        adapter = {"adapter": self.trained} if train and self.trained.kind == "adapter" else {}
        if train and not train.over:
            found |= adapter
            if not adapter or train.merge:
                found["tuned"] = self.tuned
        for scheme in self.schemes:
            found[scheme] = self.quantized(scheme)
            if recipe.quantize and scheme in recipe.quantize.recovered:
                found[f"{scheme}{_RECOVER}"] = self.recovered(scheme)
        return found | adapter

    def served_over(self, name: str) -> Draft | None:
        """The model that a variant is served over as a LoRA; None for a whole one."""
        name, draft = self.variant(name)
        if draft.kind != "adapter":
            return None
        return self.trained_over if name == "adapter" else self.quantized(name.partition("+")[0])

    def variant(self, name: str | None) -> tuple[str, Draft]:
        """A variant by name; the last one when None. Raises UserError on one it does not have."""
        chosen = name or list(self.variants)[-1]
        if chosen not in self.variants:
            raise UserError(
                f"{self.path}: this recipe makes no model {chosen!r}; "
                f"it has {', '.join(self.variants)}"
            )
        return chosen, self.variants[chosen]

    def evaluation(self, variant: str) -> Draft:
        """Quality of one variant, row by row."""
        if self.recipe.evaluate is None:
            raise UserError(f"{self.path}: this needs an evaluate section")
        section = {
            "evaluate": _drop(self.recipe.evaluate, "variants", "confidence"),
            "engine": self._engine,
            "data": _pick(self.recipe.data, "max_length") if self.recipe.data else {},
            "seed": self.recipe.seed,
        }
        parents = {"data": self.dataset.id, **self._served(variant)}
        return self._draft("eval", f"eval {variant}", section, self._template, parents)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The variants that `evaluate` measures, from the least to the most processed."""
        chosen = self.recipe.evaluate.variants if self.recipe.evaluate else None
        if chosen is None:
            whole = tuple(name for name in self.variants if name != "adapter")
            return whole if "tuned" in whole else tuple(self.variants)
        asked = {self.variant(name)[0] for name in chosen}
        return tuple(name for name in self.variants if name in asked)

    def batch(self) -> Draft:
        """Answers of the `batch` section's input."""
        batch = self.recipe.batch
        if batch is None:
            raise UserError(f"{self.path}: this needs a batch section")
        variant, _ = self.variant(batch.model)
        section = {
            "batch": _given(batch, *_BATCH_ANSWERS),
            "engine": self._engine,
            "seed": self.recipe.seed,
            # What the columns of the output are.
            "output": 2,
        }
        inputs = {"input": digest_batch(self.store, batch), **self._template}
        parents = self._served(variant)
        for name, adapter in self.batch_adapters.items():
            if isinstance(adapter, Path):
                inputs[f"adapter.{name}"] = digest_adapter(self.store, adapter)
            elif adapter is not None:
                parents[f"adapter.{name}"] = adapter.id
        return self._draft("batch", "batch", section, inputs, parents)

    @cached_property
    def batch_adapters(self) -> dict[str, Artifact | Draft | Path | None]:
        """What `batch.adapters` names; None is the model without any."""
        batch, train = self.recipe.batch, self.recipe.train
        own = self.trained if train and self.trained.kind == "adapter" else None
        named = batch.adapters if batch else {}
        return {name: adapter_of(self.store, value, own) for name, value in named.items()}

    def bench(self, mode: str) -> Draft:
        """Speed and cost of variants on this machine; `mode` is one of bench's commands."""
        bench = self.recipe.bench
        if bench is None:
            raise UserError(f"{self.path}: this needs a bench section")
        section = {
            "mode": mode,
            "bench": bench_section(bench, mode),
            "engine": self._engine,
            "price": _pick(self.recipe.price, "gpu_hour_usd") if self.recipe.price else None,
            "machine": self._machine,
            "seed": self.recipe.seed,
            # What is measured, and how.
            "measure": 2,
        }
        inputs = bench_inputs(self.store, bench) | self._template
        parents = {name: self.variants[name].id for name in self.benched(mode)}
        if "adapter" in parents:
            parents["base"] = self.trained_over.id
        if self.recipe.data and bench.prompts == "data":
            parents["data"] = self.dataset.id
        return self._draft("bench", f"bench {mode}", section, inputs, parents)

    def benched(self, mode: str) -> tuple[str, ...]:
        """The variants that a mode measures."""
        if mode == "settings":
            return self.benchmarked[-1:]
        if mode != "frontier":
            return self.benchmarked
        chosen = self.recipe.bench.variants if self.recipe.bench else None
        asked = {self.variant(name)[0] for name in chosen} if chosen else set(self.variants)
        return tuple(name for name in self.variants if name in asked)

    def bench_train(self, workload: Mapping[str, Any]) -> Draft:
        """Speed and memory of the training on this machine; `workload` is what the measurement adds
        to the recipe, with the shape that takes the place of its model and rows, if any."""
        if self.recipe.train is None:
            raise UserError(f"{self.path}: this needs a train section")
        section = {
            "mode": "train",
            "workload": dict(workload),
            "train": _drop(self.recipe.train, "over"),
            "model": _pick(self.recipe.model, "dtype"),
            "data": _pick(self.recipe.data, "max_length") if self.recipe.data else {},
            "machine": self._machine,
            "versions": describe_environment()["versions"],
            "seed": self.recipe.seed,
        }
        if workload["shape"]:
            return self._draft("bench", "bench train", section)
        parents = {"data": self.dataset.id}
        if self.recipe.train.method != "pretrain":
            parents["base"] = self.trained_over.id
        return self._draft("bench", "bench train", section, self._template, parents)

    @property
    def benchmarked(self) -> tuple[str, ...]:
        """The variants that `bench` compares: the tuned model and its quantized copies, or the
        adapter that was trained over one."""
        train = self.recipe.train
        if train and train.over:
            return ("adapter",)
        names = [name for name in self.variants if name not in ("base", "adapter")]
        return tuple(names or list(self.variants)[-1:])

    def made(self, draft: Draft) -> Artifact:
        """The finished artifact of a draft.

        A base in a folder or on the hub is recorded on first use. Raises UserError naming the
        command that makes what is missing.
        """
        if found := self.store.find(draft.id):
            return found
        if draft.kind == "base" and "source" in draft.section:
            return self._record_base(draft)
        stage = {"dataset": "data", "adapter": "train", "base": "train", "eval": "eval"}.get(
            draft.kind, "quantize" if draft.label in self.schemes else draft.label.split()[0]
        )
        stage = "train" if draft.label == "tuned" else stage
        stage = "quantize" if draft.label.startswith("fidelity ") else stage
        stage = "recover" if draft.label.startswith("recover ") else stage
        raise UserError(
            f"the {draft.label} of {self.path} ({draft.id}) has not been made; "
            f"run: tunesmith {stage} {self.path} (or: tunesmith run {self.path})"
        )

    def _record_base(self, draft: Draft) -> Artifact:
        source = draft.section["source"]
        if source == "folder":
            root = Path(str(self.recipe.model.base))
        else:
            hub = require("huggingface_hub", "train")
            root = Path(hub.snapshot_download(source, revision=draft.section["commit"]))
        with self.store.write(draft, self.recipe) as work:
            work.external_root = root.absolute()
        return self.made(draft)

    def _served(self, variant: str) -> dict[str, str]:
        _, draft = self.variant(variant)
        if beneath := self.served_over(variant):
            return {"model": beneath.id, "adapter": draft.id}
        return {"model": draft.id}

    @cached_property
    def _template(self) -> dict[str, str]:
        template = self.recipe.model.chat_template
        if template is None:
            return {}
        if not template.is_file():
            raise UserError(f"{self.path}: model.chat_template: no such file: {template}")
        return {"chat_template": self.store.digest(template)}

    @property
    def _machine(self) -> dict[str, Any]:
        """What a measured speed depends on."""
        found = describe_environment()
        return {key: found[key] for key in ("cpu", "cpu_count")} | {"gpus": list(found["gpus"])}

    @property
    def _engine(self) -> dict[str, Any]:
        engine = self.recipe.engine
        settings = _drop(engine, "start_timeout_s", "gpu_memory_utilization", *_LATER_ENGINE_KEYS)
        later = _given(engine, *_LATER_ENGINE_KEYS)
        return settings | later | _pick(self.recipe.model, "dtype")

    def _draft(
        self,
        kind: Any,
        label: str,
        section: dict[str, Any],
        inputs: Mapping[str, str] | None = None,
        parents: Mapping[str, str] | None = None,
    ) -> Draft:
        return Draft(
            kind=kind,
            label=label,
            name=self.recipe.name,
            section={**section, "revision": _REVISION},
            inputs=inputs or {},
            parents=parents or {},
        )


def builtin_recipe(name: str) -> Path:
    """The path of a recipe that comes inside the package."""
    return Path(__file__).parent.parent / "config" / "recipes" / f"{name}.yaml"


def _pick(section: Section, *names: str) -> dict[str, Any]:
    return section.model_dump(mode="json", include=set(names))


def _given(section: Section, *names: str) -> dict[str, Any]:
    """Only what is not the default, so that a key which is added later changes no id."""
    return section.model_dump(mode="json", include=set(names), exclude_defaults=True)


def _drop(section: Section, *names: str) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude=set(names))
