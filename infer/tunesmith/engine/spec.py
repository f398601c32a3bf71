"""Which model an engine runs, and vLLM's arguments for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from tunesmith.config.errors import ModelError, require
from tunesmith.config.schema.engine import Engine
from tunesmith.engine.fit import check_adapter, check_device
from tunesmith.ledger import Artifact
from tunesmith.pipeline import Stages

# The ranks that vLLM has room for (`vllm.config.lora.MaxLoRARanks`).
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# More of them in one step cost memory for each; those beyond are swapped in.
_ADAPTERS_AT_ONCE = 4
_TEMPLATE = "chat_template.jinja"


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
        }
    if spec.embeds:
        arguments |= {"runner": "pooling", "convert": "embed"}
    if adapters := spec.all_adapters:
        # On a CPU vLLM gives a request without an adapter the one in the last slot when others of
        # the step have one (`lora_ops.bgmv_expand` indexes by -1), so that slot stays empty.
        slots = min(len(adapters), _ADAPTERS_AT_ONCE) if gpu else len(adapters) + 1
        for adapter in adapters:
            check_adapter(spec.model, adapter)
        arguments |= {
            "enable_lora": True,
            "max_loras": slots,
            "max_cpu_loras": max(slots, len(adapters)),
            "max_lora_rank": max(map(_lora_rank, adapters)),
            # Without this vLLM also wraps the output head, after which it computes the
            # log-probabilities of prompts wrongly or stops (vllm#29955, vllm#51594).
            "lora_target_modules": sorted({*chain.from_iterable(map(_adapted_modules, adapters))}),
        }
    return arguments


def _adapted_modules(adapter: Path) -> set[str]:
    """Last parts of the names of the layers that the adapter changes."""
    safetensors = require("safetensors", "infer")
    with safetensors.safe_open(adapter / "adapter_model.safetensors", framework="np") as file:
        layers = {name.partition(".lora_")[0] for name in file.keys() if ".lora_" in name}  # noqa: SIM118
    return {layer.rpartition(".")[2] for layer in layers}


def _lora_rank(adapter: Path) -> int:
    """The adapter's rank, rounded up to one that vLLM has room for."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rank = max(config["r"], *config.get("rank_pattern", {}).values(), 1)
    if rank > _LORA_RANKS[-1]:
        raise ModelError(
            f"{path}: rank {rank} is above {_LORA_RANKS[-1]}, the most that vLLM serves; "
            "serve the merged model, or train with a smaller train.lora.r"
        )
    return next(allowed for allowed in _LORA_RANKS if allowed >= rank)
