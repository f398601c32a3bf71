"""Quantized checkpoints in the real engine: they answer, with an adapter too, or are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.config import ModelError
from tunesmith.config.schema.engine import Engine
from tunesmith.config.schemes import SCHEMES, has_amx, refusal
from tunesmith.engine import EngineSpec, close_llm, lora_request, open_llm
from tunesmith.engine.environment import has_gpu_engine
from tunesmith.pipeline import Stages
from tunesmith.quantize.command import run


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, stages_of: Callable[..., Stages]
) -> dict[str, Path]:
    names = [name for name, scheme in SCHEMES.items() if "rtn" in scheme.algorithms]
    section = {"quantize": {"scheme": names, "algorithm": "rtn", "calibration_rows": 4}}
    checkpoints = run(stages_of(tmp_path_factory.mktemp("made"), llama, **section))["checkpoints"]
    return {name: Path(checkpoint["folder"]) for name, checkpoint in checkpoints.items()}


def spec(model: Path, adapter: Path | None = None) -> EngineSpec:
    settings = Engine(max_model_len=64, max_num_seqs=2)
    return EngineSpec(model, settings, "bfloat16", "test", adapter=adapter)


@pytest.mark.skipif(has_gpu_engine(), reason="the refusals are a CPU's")
@pytest.mark.parametrize("on_top", [False, True], ids=["alone", "adapter"])
def test_what_this_machine_cannot_run_is_refused_in_words_and_at_once(
    made: dict[str, Path], adapter: Path, on_top: bool
) -> None:
    refused = {
        name: reason
        for name, scheme in SCHEMES.items()
        if (reason := refusal(scheme.devices(), None, has_amx=has_amx()))
    }
    assert len(refused) >= 9
    for name, reason in refused.items():
        with pytest.raises(ModelError) as caught:
            open_llm(spec(made[name], adapter if on_top else None))
        assert reason in str(caught.value) and "Ampere" in reason.partition("it runs on ")[2], name


def test_an_adapter_answers_on_top_of_a_quantized_parent(
    made: dict[str, Path], adapter: Path
) -> None:
    from vllm import SamplingParams, TokensPrompt

    over = spec(made["w4a16"], adapter)
    params = SamplingParams(temperature=0.0, max_tokens=6, detokenize=False, ignore_eos=True)
    before = os.sched_getaffinity(0), dict(os.environ)
    llm = open_llm(over)
    try:
        answers = [
            llm.generate(
                TokensPrompt(prompt_token_ids=[5, 6, 7, 8]),
                params,
                use_tqdm=False,
                lora_request=request,
            )[0].outputs[0]
            for request in (None, lora_request(over))
        ]
    finally:
        close_llm(llm)
    # What this process starts later inherits both.
    assert (os.sched_getaffinity(0), dict(os.environ)) == before
    plain, adapted = (answer.token_ids for answer in answers)
    assert len(plain) == len(adapted) == 6
    assert plain != adapted


def test_an_adapter_of_the_parent_is_refused_where_activations_were_changed(
    tmp_path: Path, llama: Path, adapter: Path, stages_of: Callable[..., Stages]
) -> None:
    section = {"quantize": {"scheme": "w8a8-int8", "smoothquant": 0.5, "calibration_rows": 4}}
    (found,) = run(stages_of(tmp_path, llama, **section))["checkpoints"].values()
    manifest = json.loads((Path(found["folder"]) / "manifest.json").read_text())
    assert manifest["metrics"]["changes_activations"] is True
    with pytest.raises(ModelError, match="serve the merged model"):
        open_llm(spec(Path(found["folder"]), adapter))
