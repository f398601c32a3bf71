"""Requests in, answers out as they are done, with the engine kept full from a bounded window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tunesmith.engine.detokenize import Detokenizer
from tunesmith.engine.offline import lora_request
from tunesmith.engine.requests import Answer, Request, answer, calls
from tunesmith.engine.spec import EngineSpec

_END = object()


@dataclass
class _Open:
    """A request in the engine, with the results of those of its calls that have ended."""

    request: Request
    calls: int
    results: dict[int, Any] = field(default_factory=dict)


def stream(
    llm: Any, requests: Iterable[Request | None], *, window: int, spec: EngineSpec
) -> Iterator[tuple[int, Answer | Exception]]:
    """Answers by key, in the order in which they finish; the exception where vLLM refused one.

    At most `window` requests are in the engine at a time, and `requests` is read no further. A
    None among them says that there is no other at the moment.
    """
    from vllm.exceptions import VLLMClientError
    from vllm.inputs.engine import tokens_input

    engine, detokenizer = llm.llm_engine, Detokenizer(llm.get_tokenizer())
    waiting = iter(requests)
    is_exhausted = False
    opened: dict[int, _Open] = {}
    while True:
        while not is_exhausted and len(opened) < window:
            request = next(waiting, _END)
            if not isinstance(request, Request):
                is_exhausted = request is _END
                break
            sent = []
            try:
                lora = lora_request(spec, request.adapter)
                parts = calls(request)
                for at, (prompt_ids, params) in enumerate(parts):
                    name = f"{request.key}/{at}"
                    sent.append(
                        engine.add_request(
                            name, tokens_input(prompt_ids), params, lora_request=lora
                        )
                    )
                opened[request.key] = _Open(request, len(parts))
            except (ValueError, VLLMClientError) as error:
                engine.abort_request(sent, internal=True)
                yield request.key, error
        if not opened:
            if is_exhausted:
                return
            continue
        for output in engine.step():
            if not output.finished:
                continue
            key, _, at = output.request_id.partition("/")
            if (held := opened.get(int(key))) is None:
                continue
            held.results[int(at)] = output
            if len(held.results) == held.calls:
                del opened[held.request.key]
                results = [held.results[part] for part in range(held.calls)]
                yield held.request.key, answer(held.request, results, detokenizer)
