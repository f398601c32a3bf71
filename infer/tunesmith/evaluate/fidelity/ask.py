"""What is asked of an engine: functions that run in its process.

Shape suffixes: S tokens of a sequence, T those of them that are learnt, K candidates per token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.evaluate.heldout import Scored
from tunesmith.evaluate.measure import Engine, answers_of, generate
from tunesmith.terminal import progress_bar

TOP_K = 64
"""Candidates per position that are reported with their probability."""


@dataclass(frozen=True)
class Distributions:
    """How one sequence is predicted."""

    losses_S: npt.NDArray[np.float32]
    """Nats of every token but the first."""

    ids_TK: npt.NDArray[np.int32]
    """At each learnt position the likeliest tokens, the likeliest first."""

    logprobs_TK: npt.NDArray[np.float32]
    """Their log-probabilities."""


def facts(engine: Engine) -> dict[str, Any]:
    """What the engine made of the model."""
    import torch

    config = engine.llm.model_config
    [found, *_] = engine.llm.apply_model(_model_facts)
    # Kernels of CPUs keep the weights outside torch.
    tensor_bytes = found.pop("tensor_bytes")
    return {
        "loaded_bytes": tensor_bytes if torch.cuda.is_available() else engine.loaded_bytes,
        "load_s": engine.load_s,
        "max_model_len": config.max_model_len,
        "vocabulary": config.get_vocab_size(),
        **found,
    }


def score(engine: Engine, sequences: Sequence[Scored], title: str) -> list[Distributions]:
    """Each sequence's losses, and its distributions at learnt positions."""
    from vllm import SamplingParams

    # The engine reports log-probabilities of a prompt only along with a token after it.
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=min(TOP_K, engine.llm.model_config.get_vocab_size()),
        detokenize=False,
        flat_logprobs=True,
    )
    found = []
    with progress_bar(title, len(sequences)) as bar:
        # A batch at a time: vLLM's lists take a hundred bytes per candidate.
        for start in range(0, len(sequences), engine.max_num_seqs):
            chunk = sequences[start : start + engine.max_num_seqs]
            outputs = generate(engine, [one.input_ids for one in chunk], params, bar)
            found += [
                _read(output.prompt_logprobs, one.learnt)
                for one, output in zip(chunk, outputs, strict=True)
            ]
    return found


def answer(
    engine: Engine,
    prompts: dict[str, list[int]],
    end_of_turn_id: int | None,
    max_tokens: int,
    title: str,
) -> dict[str, dict[str, str]]:
    """The greedy answer to each prompt, by id."""
    with progress_bar(title, len(prompts)) as bar:
        return answers_of(engine, prompts, end_of_turn_id, max_tokens, bar)


def round_s(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> float:
    """Seconds to write `tokens` after each prompt, all asked at once."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    requests = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    started_s = time.perf_counter()
    engine.llm.generate(requests, params, use_tqdm=False, lora_request=engine.lora_request)
    return time.perf_counter() - started_s


def peak_bytes(_: Engine) -> int:
    """The most memory of the device that this process has held so far."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    return process_bytes("VmHWM")


def process_bytes(name: str) -> int:
    """A line of what the kernel says of this process: VmRSS is its memory, VmHWM its peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [line] = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _model_facts(model: Any) -> dict[str, Any]:
    """Runs where the model is: its size there, and the kernels its linear layers chose."""
    kernels = set()
    for module in model.modules():
        for holder in (getattr(module, "scheme", None), getattr(module, "quant_method", None)):
            for part in vars(holder).values() if hasattr(holder, "__dict__") else ():
                if type(part).__module__.startswith("vllm.model_executor.kernels."):
                    kernels.add(type(part).__name__)
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return {
        "kernels": sorted(kernels),
        "tensor_bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


def _read(flat: Any, learnt: Sequence[int]) -> Distributions:
    """vLLM's lists: at each position the token itself, then the likeliest."""
    ids = np.asarray(flat.token_ids, dtype=np.int32)
    logprobs = np.asarray(flat.logprobs, dtype=np.float32)
    starts = np.asarray(flat.start_indices[1:])
    at_T = starts[np.asarray(learnt, dtype=np.int64) - 1]
    width = len(ids) // len(starts) - 1
    pick_TK = at_T[:, None] + 1 + np.arange(width)
    return Distributions(-logprobs[starts], ids[pick_TK], logprobs[pick_TK])
