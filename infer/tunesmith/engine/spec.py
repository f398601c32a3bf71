"""Which model an engine runs, and vLLM's arguments for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.config.errors import ModelError
from tunesmith.config.schema.engine import Engine
from tunesmith.engine.adapters import adapter_arguments
from tunesmith.engine.fit import check_device
from tunesmith.ledger import Artifact
from tunesmith.pipeline import Stages

_TEMPLATE = "chat_template.jinja"
_CPU_WORKER = "tunesmith.vllm_plugin.cpu_worker.Worker"
_LEFT_TO_VLLM = {
    "max_num_batched_tokens", "enable_chunked_prefill", "enable_prefix_caching", "kv_cache_dtype",
}  # fmt: skip


@dataclass(frozen=True)
class EngineSpec:
    """One model of a recipe as the engine gets it."""

    model: Path
    """Folder of the whole model, or of the adapter's base."""

    settings: Engine
    dtype: str
    served_name: str
    """What clients call it."""

    adapter: Path | None = None
    """Folder of a LoRA adapter to apply to every request."""

    adapters: Mapping[str, Path | None] = field(default_factory=dict)
    """Folders of further adapters by the names that single requests ask for; None is the model
    without any."""

    adapter_slots: int = 0
    """Adapters that a server may hold while they come and go; 0 where they stay as they are."""

    embeds: bool = False
    """Whether the model gives embeddings in place of answers."""

    chat_template: Path | None = None
    """Jinja file to use in place of the tokenizer's own template."""

    seed: int = 0
    trust_remote_code: bool = False

    @property
    def all_adapters(self) -> tuple[Path, ...]:
        """Each folder once, the spec's own first."""
        found = [self.adapter, *self.adapters.values()]
        return tuple(dict.fromkeys(path for path in found if path))


def engine_spec(stages: Stages, variant: str | None) -> EngineSpec:
    """The spec of a variant; of the recipe's last one when None.

    Raises UserError when the recipe has no such variant or it has not been made, ModelError when
    the recipe would talk to it in another chat template than the one it was trained with.
    """
    recipe = stages.recipe
    name, draft = stages.variant(variant)
    made = stages.made(draft)
    beneath = stages.served_over(name)
    adapter = made.root if beneath else None
    template = recipe.model.chat_template
    if template is None and adapter and (adapter / _TEMPLATE).is_file():
        template = adapter / _TEMPLATE
    # A base that is being trained may be taught another template than the one it knows.
    if recipe.model.chat_template and (name != "base" or not recipe.train):
        _check_template(stages, made, recipe.model.chat_template)
    return EngineSpec(
        model=stages.made(beneath).root if beneath else made.root,
        settings=recipe.engine,
        dtype=recipe.model.dtype,
        served_name=recipe.name,
        adapter=adapter,
        chat_template=template.absolute() if template else None,
        seed=recipe.seed,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def _check_template(stages: Stages, model: Artifact, template: Path) -> None:
    """The model's own training, or its nearest parent's, decides how it can be talked to."""
    for artifact in (model, *stages.store.ancestors(model)):
        trained = artifact.root / _TEMPLATE
        if "method" not in artifact.manifest.metrics or not trained.is_file():
            continue
        data = stages.store.get(artifact.manifest.parents["data"])
        if data.manifest.section["data"]["format"] == "text":
            continue  # no template had a part in that training
        if trained.read_text(encoding="utf-8") != template.read_text(encoding="utf-8"):
            raise ModelError(
                f"model.chat_template: {template} is not the template that {artifact.id} was "
                f"trained with, which is {trained}; leave model.chat_template out to use that one"
            )
        return


def engine_arguments(spec: EngineSpec, *, gpu: bool) -> dict[str, Any]:
    """vLLM's `EngineArgs` by name, for the offline engine and the server alike.

    Raises ModelError for a model that this machine's engine cannot run, and an adapter that does
    not fit it.
    """
    check_device(spec.model, spec.dtype, gpu=gpu)
    settings = spec.settings
    arguments: dict[str, Any] = {
        "model": str(spec.model),
        "dtype": spec.dtype,
        "seed": spec.seed,
        "max_num_seqs": settings.max_num_seqs,
        "trust_remote_code": spec.trust_remote_code,
        "use_tqdm_on_load": False,
    }
    if settings.max_model_len:
        arguments["max_model_len"] = settings.max_model_len
    # What is left as it is vLLM decides by the model: some can do without one or the other alone.
    arguments |= settings.model_dump(include=_LEFT_TO_VLLM, exclude_defaults=True)
    if gpu:
        arguments |= {
            "enforce_eager": settings.enforce_eager,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "tensor_parallel_size": settings.tensor_parallel_size,
        }
    else:
        # With both of these vLLM skips its warm-up, and the size may be a fraction of a GiB,
        # which VLLM_CPU_KVCACHE_SPACE may not.
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
            "worker_cls": _CPU_WORKER,
        }
    if spec.embeds:
        arguments |= {"runner": "pooling", "convert": "embed"}
    if adapters := spec.all_adapters:
        arguments |= adapter_arguments(spec.model, adapters, spec.adapter_slots, gpu=gpu)
    return arguments
