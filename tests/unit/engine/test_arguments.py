"""vLLM's arguments and environment, and the cause found in what it says."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tunesmith.config import ModelError, TunesmithError
from tunesmith.config.schema.engine import Engine
from tunesmith.engine import EngineSpec
from tunesmith.engine.environment import server_environment, usable_cores
from tunesmith.engine.failures import start_failure
from tunesmith.engine.server import command_line
from tunesmith.engine.spec import engine_arguments


def make_spec(folder: Path, rank: int | None = None, **settings: object) -> EngineSpec:
    adapter = None
    if rank is not None:
        adapter = folder / "adapter"
        adapter.mkdir()
        config = {"r": rank, "rank_pattern": {"q_proj": rank // 2}}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        weights = {
            f"base_model.model.model.layers.{layer}.{name}.lora_{half}.weight": np.zeros((1, 1))
            for layer in (0, 1)
            for name in ("self_attn.q_proj", "mlp.down_proj")
            for half in "AB"
        }
        save_file(weights, adapter / "adapter_model.safetensors")
    return EngineSpec(
        model=folder, settings=Engine(**settings), dtype="bfloat16", served_name="x",
        adapter=adapter,
    )  # fmt: skip


def test_cpu_and_gpu_get_their_own_arguments(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, kv_cache_gib=0.25, tensor_parallel_size=4, max_model_len=512)
    cpu, gpu = engine_arguments(spec, gpu=False), engine_arguments(spec, gpu=True)
    assert cpu["kv_cache_memory_bytes"] == 2**28 and cpu["enforce_eager"] is True
    assert cpu["worker_cls"].endswith("cpu_worker.Worker") and "worker_cls" not in gpu
    assert "tensor_parallel_size" not in cpu and "gpu_memory_utilization" not in cpu
    assert gpu["tensor_parallel_size"] == 4 and gpu["enforce_eager"] is False
    assert "kv_cache_memory_bytes" not in gpu
    assert cpu["max_model_len"] == gpu["max_model_len"] == 512


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (4, 8), (16, 16), (17, 32), (512, 512)])
def test_a_lora_rank_is_rounded_up_to_one_that_vllm_allows(
    tmp_path: Path, rank: int, allowed: int
) -> None:
    arguments = engine_arguments(make_spec(tmp_path, rank), gpu=False)
    assert arguments["max_lora_rank"] == allowed
    assert arguments["lora_target_modules"] == ["down_proj", "q_proj"]


def test_adapters_of_single_requests_have_room_beside_the_specs_own(tmp_path: Path) -> None:
    specs = []
    for at, rank in enumerate((4, 17, 1, 8, 2)):
        (tmp_path / str(at)).mkdir()
        specs.append(make_spec(tmp_path / str(at), rank))
    folders = [spec.adapter for spec in specs]
    names = {"b": folders[1], "same": folders[0], "none": None}
    two = replace(specs[0], adapters=names)
    assert two.all_adapters == (folders[0], folders[1])
    five = replace(specs[0], adapters={str(at): folder for at, folder in enumerate(folders)})
    for spec, gpu, slots, kept in [
        (two, True, 2, 2),
        (five, True, 4, 5),
        (two, False, 3, 3),
        (five, False, 6, 6),
    ]:
        arguments = engine_arguments(spec, gpu=gpu)
        assert (arguments["max_loras"], arguments["max_cpu_loras"]) == (slots, kept)
        assert arguments["max_lora_rank"] == 32
    bare = replace(specs[0], adapter=None, adapters={"none": None}, embeds=True)
    arguments = engine_arguments(bare, gpu=False)
    assert "enable_lora" not in arguments and arguments["runner"] == "pooling"


def test_a_lora_rank_above_all_is_refused_before_the_engine_starts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="rank 600 is above 512"):
        engine_arguments(make_spec(tmp_path, 600), gpu=False)


def test_command_line_spells_values_and_switches() -> None:
    arguments = {
        "max_num_seqs": 8,
        "enforce_eager": True,
        "trust_remote_code": False,
        "x": ["a", "b"],
    }
    assert command_line(arguments) == [
        "--max-num-seqs", "8", "--enforce-eager", "--no-trust-remote-code", "--x", "a", "b",
    ]  # fmt: skip


def test_the_recipe_decides_the_cache_size_not_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    environment = server_environment(gpu=False)
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == "1"


def test_cores_are_distinct_and_allowed() -> None:
    cores = usable_cores()
    assert cores and len(set(cores)) == len(cores)
    assert set(cores) <= os.sched_getaffinity(0)


LOG = """\
(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] EngineCore failed to start.
(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1]   File "x.py", line 1, in f
(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] ValueError: No kernel for W8A16. Reasons:
(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1]  Marlin: not on a CPU
(APIServer pid=6) Traceback (most recent call last):
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.
guard: the command ended with 1
"""


def test_the_cause_is_the_line_that_matters_and_typed(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    refusal = start_failure(LOG, spec, tmp_path / "log")
    assert isinstance(refusal, ModelError)
    assert "No kernel for W8A16. Reasons: Marlin: not on a CPU" in str(refusal)
    assert str(tmp_path / "log") in str(refusal)
    pydantic = (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, no such model type [type=value_error, input_value=1]\n"
    )
    assert "does not take" in str(start_failure(pydantic, spec))
    assert str(start_failure(pydantic, spec)).splitlines()[0].endswith(": no such model type")
    crash = start_failure("MemoryError: \nOSError: [Errno 98] Address already in use", spec)
    assert not isinstance(crash, ModelError) and isinstance(crash, TunesmithError)
    assert "no reason" in str(start_failure("Killed", spec))
    native = (
        "Fatal Python error: Illegal instruction\n\nThread 0x00007f9b8d2ff6c0\n"
        "(APIServer pid=1) ERROR 11-29 17:01:07 [async_llm.py:906] vllm.v1.engine.exceptions."
        "EngineDeadError: EngineCore encountered an issue. See stack trace (above).\n"
    )
    assert "Fatal Python error: Illegal instruction" in str(start_failure(native, spec))
