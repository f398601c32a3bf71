"""Prompts in, answers out as they are done, with the engine kept full from a bounded window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """One prompt for the engine."""

    key: int
    """What its answer is called; no two open requests share one."""

    prompt_ids: list[int]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Answer:
    """What the engine made of one prompt."""

    text: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int


def stream(
    llm: Any, requests: Iterable[Request], *, window: int, lora_request: Any, stop_token_id: int
) -> Iterator[tuple[int, Answer | Exception]]:
    """Answers by key, in the order in which they finish; the exception where vLLM refused one.

    At most `window` requests are in the engine at a time, and `requests` is read no further.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    waiting = iter(requests)
    is_exhausted = False
    while True:
        while not is_exhausted and engine.get_num_unfinished_requests() < window:
            request = next(waiting, None)
            if request is None:
                is_exhausted = True
                break
            try:
                params = SamplingParams(
                    max_tokens=request.max_tokens,
                    temperature=request.temperature,
                    seed=request.seed if request.temperature > 0 else None,
                    stop_token_ids=[stop_token_id],
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(
                    str(request.key),
                    tokens_input(request.prompt_ids),
                    params,
                    lora_request=lora_request,
                )
            except (ValueError, VLLMClientError) as error:
                yield request.key, error
        if not engine.has_unfinished_requests():
            return
        for output in engine.step():
            if output.finished:
                made = output.outputs[0]
                yield (
                    int(output.request_id),
                    Answer(
                        text=made.text,
                        finish_reason=made.finish_reason or "abort",
                        prompt_tokens=len(output.prompt_token_ids),
                        output_tokens=len(made.token_ids),
                    ),
                )
