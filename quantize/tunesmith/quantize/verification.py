"""Has each checkpoint compared with its parent by the stage that serves it, in its own process."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path

from tunesmith.config import dump_recipe
from tunesmith.pipeline import Stages
from tunesmith.pipeline.run import spawn
from tunesmith.pipeline.verdict import Verdict, how_to_verify, verdict_of
from tunesmith.quantize.calibration import Calibration
from tunesmith.terminal import log


def verify_in_engine(stages: Stages) -> dict[str, Verdict]:
    """The verdict over each checkpoint of the recipe, measuring what is not measured yet.

    One process of this same CLI opens the parent once and each checkpoint beside it. Without vLLM
    they stay unverified, with a line that says how to verify them elsewhere.
    """
    wanted = stages.schemes if stages.fidelities else ()
    open_ones = [name for name in wanted if not stages.store.find(stages.fidelity(name).id)]
    if open_ones and importlib.util.find_spec("vllm") is None:
        log(f"{', '.join(open_ones)}: not verified, vLLM is not installed: {how_to_verify(stages)}")
    elif open_ones:
        _measure(stages)
    return {name: verdict_of(stages, name) for name in stages.schemes}


def keep_calibration(stages: Stages, scheme: str, calibration: Calibration) -> None:
    """Leave the tokens where the verification asks the parent whether it knows such text."""
    path = stages.calibration_file(scheme)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(calibration.input_ids), encoding="utf-8")


def _measure(stages: Stages) -> None:
    """With refusals allowed over there: it is for the one that asked to judge."""
    recipe = stages.recipe
    assert recipe.quantize
    measuring = recipe.model_copy(
        update={"quantize": recipe.quantize.model_copy(update={"allow_refused": True})}
    )
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(dump_recipe(measuring), encoding="utf-8")
        spawn("verification", ("eval", "--fidelity"), path, shown=False)
