"""`scheme: auto`: tries schemes, judges each in the engine, takes the best within the limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.config import GateError
from tunesmith.config.schema.quantize import AUTO, Search
from tunesmith.config.schemes import DEVICES, SCHEMES
from tunesmith.ledger import Artifact
from tunesmith.pipeline import Stages
from tunesmith.pipeline.verdict import summary_of
from tunesmith.quantize.calibration import calibration_of
from tunesmith.quantize.making import make, refused_here
from tunesmith.quantize.modules import block_of, select
from tunesmith.quantize.schemes import Method
from tunesmith.quantize.sensitivity import block_divergences
from tunesmith.quantize.skeleton import Skeleton
from tunesmith.quantize.verification import verify_in_engine
from tunesmith.terminal import log

_SENSITIVITY_SEQUENCES = 16


@dataclass(frozen=True)
class Tried:
    """One checkpoint that was made and judged."""

    scheme: str
    keep: tuple[str, ...]
    """Blocks that were left in 16 bits."""

    id: str
    fidelity: str | None
    """Id of what was measured of it."""

    bytes: int
    state: str
    reasons: tuple[str, ...]
    loss_increase: float | None
    """Against the parent; 0.01 is 1 %."""

    tokens_per_s: float | None
    """With a full queue."""

    @property
    def name(self) -> str:
        """For people."""
        blocks = f" less {len(self.keep)} blocks" if self.keep else ""
        return f"{self.scheme}{blocks}"


def search(stages: Stages) -> Artifact:
    """The checkpoint that was chosen, recorded under the recipe's own name for it.

    Every candidate is an artifact as if the recipe had named its scheme, so that a search which is
    stopped or widened makes none twice. Raises GateError when none keeps the limits.
    """
    recipe, draft = stages.recipe, stages.quantized(AUTO)
    assert recipe.quantize
    settings = recipe.quantize.search
    sizes, refused = _candidates(stages)
    if settings.minimize == "size":
        tried = _from_the_smallest(stages, sizes)
    else:
        tried = _try(stages, *sizes)
    best = choose(tried, settings)
    if best is None:
        lines = [f"  {one.name}: {'; '.join(one.reasons) or one.state}" for one in tried]
        raise GateError(
            "\n".join(["no scheme keeps the limits of quantize:", *lines])
            + "\nraise the limit that the nearest one breaks, or name a scheme"
        )
    reason = explain(best, tried, settings)
    log(f"auto: {best.name} ({best.id}): {reason}")
    chosen = stages.store.get(best.id)
    with stages.store.write(draft, recipe) as work:
        work.external_root = chosen.root
        work.metrics |= chosen.manifest.metrics | {
            "chosen": best.name,
            "chosen_id": best.id,
            "fidelity": best.fidelity,
            "reason": reason,
            "search": [{"name": one.name, **asdict(one)} for one in tried],
            "not_here": refused,
            "pareto": [one.name for one in pareto(tried)],
        }
    return stages.made(draft)


def choose(tried: Sequence[Tried], settings: Search) -> Tried | None:
    """The best of those that were approved."""
    keys = {
        "size": lambda one: one.bytes,
        "time": lambda one: -(one.tokens_per_s or 0.0),
        "loss": lambda one: one.loss_increase or 0.0,
    }
    approved = [one for one in tried if one.state == "approved"]
    return min(approved, key=keys[settings.minimize], default=None)


def pareto(tried: Sequence[Tried]) -> list[Tried]:
    """Those that no other one beats in size, loss and speed at once, smallest first."""

    def place(one: Tried) -> tuple[float, float, float]:
        return one.bytes, one.loss_increase or 0.0, -(one.tokens_per_s or 0.0)

    measured = [one for one in tried if one.loss_increase is not None]
    return sorted(
        (
            one
            for one in measured
            if not any(
                place(other) != place(one)
                and all(a <= b for a, b in zip(place(other), place(one), strict=True))
                for other in measured
            )
        ),
        key=lambda one: one.bytes,
    )


def explain(best: Tried, tried: Sequence[Tried], settings: Search) -> str:
    """Why it was chosen, in one line."""
    what = {
        "size": "the smallest that keeps the limits",
        "time": "the fastest that keeps the limits",
        "loss": "the nearest to its parent within the limits",
    }[settings.minimize]
    smaller = [one.name for one in tried if one.state != "approved" and one.bytes < best.bytes]
    return what + (f"; smaller and refused: {', '.join(smaller)}" if smaller else "")


def _candidates(stages: Stages) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes of each scheme that can be tried, smallest first; the reason of each that cannot."""
    quantize = stages.recipe.quantize
    assert quantize
    parent = stages.made(stages.unquantized)
    skeleton = Skeleton.of(
        parent.root, stages.recipe.model.dtype, stages.recipe.model.trust_remote_code
    )
    whole = sum(tensor.nbytes for tensor in skeleton.stored(skeleton.model).values())
    sizes, refused = {}, {}
    for name in quantize.search.candidates or SCHEMES:
        method = Method.of(quantize, name)
        if reason := _device_refusal(method, quantize.device):
            refused[name] = reason
            continue
        size = _predicted_bytes(skeleton, method, whole)
        if size > quantize.search.max_size * whole:
            refused[name] = f"{size / whole:.0%} of its parent, above quantize.search.max_size"
        else:
            sizes[name] = size
    if not sizes:
        lines = [f"  {name}: {reason}" for name, reason in refused.items()]
        raise GateError("\n".join(["quantize.search: no scheme can be tried:", *lines]))
    return dict(sorted(sizes.items(), key=lambda item: item[1])), refused


def _device_refusal(method: Method, device: str | None) -> str | None:
    """To be judged it has to run here; to be served, on the device that the recipe names."""
    if device in DEVICES and (reason := method.scheme.devices()[str(device)]):
        return reason
    return refused_here(method)


def _predicted_bytes(skeleton: Skeleton, method: Method, whole: int) -> int:
    selection = select(skeleton.model, method)
    size = whole
    for name, (outputs, inputs) in selection.quantized.items():
        size -= skeleton.model.get_submodule(name).weight.nbytes
        size += method.layer_bytes(outputs, inputs, selection.group_size)
    return size


def _from_the_smallest(stages: Stages, sizes: dict[str, int]) -> list[Tried]:
    """Up to the first one that is approved, and then smaller mixes of those that were not."""
    quantize, tried = stages.recipe.quantize, []
    assert quantize
    for name in sizes:
        tried += _try(stages, name)
        if tried[-1].state == "approved":
            break
    bound = tried[-1].bytes if tried[-1].state == "approved" else None
    if not quantize.search.mix or bound is None:
        return tried
    for failed in list(tried[:-1]):
        mixes = list(_mixes(stages, failed, bound))
        tried += mixes
        if any(one.state == "approved" for one in mixes):
            break
    return tried


def _mixes(stages: Stages, failed: Tried, bound: int) -> Iterator[Tried]:
    """A failed scheme with its most sensitive blocks kept: as few as pass, found by halving, and
    never so many that it is as large as `bound` bytes."""
    quantize = stages.recipe.quantize
    assert quantize
    if Method.of(quantize, failed.scheme).changes_activations or failed.loss_increase is None:
        return
    blocks = _by_sensitivity(stages, failed)
    low, high = 1, len(blocks) - 1
    while low <= high:
        count = (low + high) // 2
        keep = tuple(blocks[:count])
        if failed.bytes + _growth(stages, failed, keep) >= bound:
            high = count - 1
            continue
        (one,) = _try(stages, failed.scheme, keep=keep)
        yield one
        if one.state == "approved":
            high = count - 1
        else:
            low = count + 1


def _by_sensitivity(stages: Stages, failed: Tried) -> list[str]:
    """The blocks of a checkpoint, the one that costs most first."""
    recipe = stages.recipe
    parent = stages.made(stages.unquantized)
    checkpoint = stages.store.get(failed.id)
    calibration = calibration_of(recipe, stages.made(stages.dataset), parent.root)
    costs = block_divergences(
        parent.root,
        checkpoint.root,
        checkpoint.manifest.metrics["quantized"],
        calibration.input_ids[:_SENSITIVITY_SEQUENCES],
        dtype=recipe.model.dtype,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return sorted(costs, key=lambda block: -costs[block])


def _growth(stages: Stages, failed: Tried, keep: tuple[str, ...]) -> int:
    """Bytes that keeping these blocks adds."""
    recipe = stages.recipe
    assert recipe.quantize
    parent = stages.made(stages.unquantized)
    skeleton = Skeleton.of(parent.root, recipe.model.dtype, recipe.model.trust_remote_code)
    method = Method.of(recipe.quantize, failed.scheme)
    selection = select(skeleton.model, method)
    return sum(
        skeleton.model.get_submodule(name).weight.nbytes
        - method.layer_bytes(outputs, inputs, selection.group_size)
        for name, (outputs, inputs) in selection.quantized.items()
        if block_of(name) in keep
    )


def _try(stages: Stages, *names: str, keep: tuple[str, ...] = ()) -> list[Tried]:
    """Make and judge candidates."""
    candidates = stages.with_schemes(*names, keep=keep)
    for name in names:
        if candidates.store.find(candidates.quantized(name).id) is None:
            make(candidates, name)
    verify_in_engine(candidates)
    return [_tried(candidates, name, keep, found) for name, found in summary_of(candidates).items()]


def _tried(stages: Stages, name: str, keep: tuple[str, ...], found: dict[str, Any]) -> Tried:
    checkpoint = stages.made(stages.quantized(name))
    metrics = found["metrics"]
    loaded = bool(metrics and metrics["loads"])
    return Tried(
        scheme=name,
        keep=keep,
        id=checkpoint.id,
        fidelity=found["id"],
        bytes=checkpoint.manifest.metrics["bytes"],
        state=found["state"],
        reasons=tuple(found["reasons"]),
        loss_increase=metrics["total"]["loss_increase"]["value"] if loaded else None,
        tokens_per_s=_rate(metrics) if loaded else None,
    )


def _rate(metrics: dict[str, Any]) -> float:
    found: float = metrics["speed"]["saturation"]["tokens_per_s"]["value"]
    return found
