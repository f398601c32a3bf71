"""One model in the engine: the loss of each held-out row, its greedy answer, and how good it is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.config.schema.evaluate import Evaluate
from tunesmith.evaluate.heldout import HeldOut, Scored
from tunesmith.evaluate.metrics import TEXT_METRICS
from tunesmith.terminal import Bar, progress_bar

_ROUNDS_PER_CALL = 4


@dataclass(frozen=True)
class Engine:
    """A loaded model."""

    llm: Any
    lora_request: Any
    """The adapter to apply; None for a whole model."""

    max_num_seqs: int
    load_s: float
    loaded_bytes: int = 0
    """What loading added to the memory of the process."""


def measure(
    engine: Engine, held_out: HeldOut, section: Evaluate, name: str
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows as they are written to `rows.jsonl`, and the seconds that each kind of work took."""
    items = held_out.items
    sequences = [one for item in items for one in item.scored]
    asked = {item.id: item.prompt_ids for item in items if item.prompt_ids is not None}
    texts = [task for task in section.tasks if task in TEXT_METRICS]
    wants_loss = "completion_loss" in section.tasks
    total = (len(sequences) if wants_loss else 0) + (len(asked) if texts else 0)
    with progress_bar(f"evaluating {name}", total) as bar:
        started_s = time.monotonic()
        losses = _losses(engine, sequences, bar) if wants_loss else []
        scored_s = time.monotonic()
        answers = (
            answers_of(engine, asked, held_out.end_of_turn_id, section.max_tokens, bar)
            if texts
            else {}
        )
        answered_s = time.monotonic()
    per_sequence = iter(losses)
    rows = []
    for item in items:
        sums = [next(per_sequence) for _ in item.scored] if wants_loss else None
        row = {
            "id": item.id,
            "completion_loss_sum_nats": sum(sums) if sums else None,
            "completion_tokens": sum(len(one.learnt) for one in item.scored),
            **answers.get(item.id, {"answer": None, "finish_reason": None}),
            "reference": item.reference,
        }
        rows.append(row | {task: text_score(task, row) for task in texts})
    seconds = {
        "completion_loss": round(scored_s - started_s, 3),
        "answers": round(answered_s - scored_s, 3),
    }
    return rows, seconds


def text_score(task: str, row: dict[str, Any]) -> float | None:
    if row["answer"] is None or row["reference"] is None:
        return None
    return TEXT_METRICS[task](row["answer"], row["reference"])


def _losses(engine: Engine, sequences: Sequence[Scored], bar: Bar) -> list[float]:
    """Negative log-likelihood of each sequence's learnt tokens, in nats."""
    from vllm import SamplingParams

    # The engine reports log-probabilities of a prompt only along with a token after it.
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = generate(engine, [one.input_ids for one in sequences], params, bar)
    return [
        -sum(output.prompt_logprobs[at][one.input_ids[at]].logprob for at in one.learnt)
        for one, output in zip(sequences, outputs, strict=True)
    ]


def answers_of(
    engine: Engine,
    prompts: Mapping[str, list[int]],
    end_of_turn_id: int | None,
    max_tokens: int,
    bar: Bar,
) -> dict[str, dict[str, str]]:
    """The greedy answer to each prompt, by its id."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        stop_token_ids=None if end_of_turn_id is None else [end_of_turn_id],
    )
    outputs = generate(engine, list(prompts.values()), params, bar)
    return {
        name: {
            "answer": output.outputs[0].text,
            "finish_reason": output.outputs[0].finish_reason,
        }
        for name, output in zip(prompts, outputs, strict=True)
    }


def generate(engine: Engine, prompts: Sequence[list[int]], params: Any, bar: Bar) -> list[Any]:
    """All outputs in order, a few full batches at a time so that progress shows."""
    from vllm import TokensPrompt

    step = _ROUNDS_PER_CALL * engine.max_num_seqs
    outputs: list[Any] = []
    for start in range(0, len(prompts), step):
        chunk = [TokensPrompt(prompt_token_ids=ids) for ids in prompts[start : start + step]]
        outputs += engine.llm.generate(
            chunk, params, use_tqdm=False, lora_request=engine.lora_request
        )
        bar.advance(len(chunk))
    return outputs
