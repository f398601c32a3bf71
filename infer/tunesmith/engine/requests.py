"""What the engine is asked and what it says, as plain values; and both in vLLM's terms.

A `Request` and an `Answer` are pickled, hashed and stored; nothing of vLLM is in them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from tunesmith.engine.detokenize import Detokenizer, is_at_once

Kind = Literal["generate", "score", "embed"]


@dataclass(frozen=True)
class Request:
    """One prompt for the engine."""

    key: int
    """What its answer is called; no two open requests share one."""

    prompt_ids: Sequence[int]

    kind: Kind = "generate"
    """Write on from the prompt, say how likely each part is after it, or embed it."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's `SamplingParams` (of `PoolingParams` to embed) as plain JSON values."""

    parts: Sequence[Sequence[int]] = ()
    """Token ids that each follow the prompt in a call of its own: completions to score, texts to
    embed, prompts of a list. The prompt alone where there are none."""

    adapter: str | None = None
    """Which of the spec's `adapters` answers; the spec's own model when null."""

    @cached_property
    def digest(self) -> str:
        """Hash of all that decides the answer: equal requests need to be computed once."""
        parts = [
            self.kind,
            list(self.prompt_ids),
            dict(self.sampling),
            [list(ids) for ids in self.parts],
            self.adapter,
        ]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that the engine will see."""
        return len(self.prompt_ids) + max(map(len, self.parts), default=0)

    @property
    def prompts(self) -> list[list[int]]:
        """What the engine is given, one after the other."""
        return [[*self.prompt_ids, *part] for part in self.parts] or [[*self.prompt_ids]]


@dataclass(frozen=True)
class Output:
    """One sample of an answer."""

    text: str
    finish_reason: str
    output_tokens: int
    logprobs: list[dict[str, Any]] | None = None
    """Per token `{token, logprob, top: [{token, logprob}]}`, where they were asked for."""


@dataclass(frozen=True)
class Answer:
    """What the engine made of one request."""

    prompt_tokens: int
    """Tokens that were read, over all calls."""

    cached_tokens: int = 0
    """Those of them that the prefix cache had."""

    outputs: list[Output] = field(default_factory=list)
    """The samples, in order; those of one prompt after those of the one before it."""

    scores: list[list[float]] | None = None
    """Per part the log-probability of each of its tokens."""

    embeddings: list[list[float]] | None = None
    """Per part, or of the prompt."""

    @property
    def output_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(output.output_tokens for output in self.outputs)


def calls(request: Request) -> list[tuple[list[int], Any]]:
    """The prompts, with their vLLM parameters, that together answer a request.

    Raises ValueError, or what vLLM raises, when it does not take the parameters.
    """
    try:
        return _calls(request)
    except TypeError as error:  # an unknown name, or a value of another type
        raise ValueError(str(error)) from error


def _calls(request: Request) -> list[tuple[list[int], Any]]:
    from vllm import PoolingParams, SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    if request.kind == "embed":
        return [(ids, PoolingParams(task="embed", **request.sampling)) for ids in request.prompts]
    prompts, sampling = request.prompts, dict(request.sampling)
    if request.kind == "score":
        sampling = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        if labels := _single_tokens(request):
            prompts, sampling["logprob_token_ids"] = [[*request.prompt_ids]], labels
        else:
            sampling["prompt_logprobs"] = 0
    if structured := sampling.pop("structured_outputs", None):
        sampling["structured_outputs"] = StructuredOutputsParams(**structured)
    if bias := sampling.pop("logit_bias", None):
        sampling["logit_bias"] = {int(token): value for token, value in bias.items()}
    if is_at_once(sampling):
        sampling["detokenize"] = False
    # Made here for one call: vLLM need not copy them.
    own = {"output_kind": RequestOutputKind.FINAL_ONLY, "skip_clone": True}
    return [(ids, SamplingParams(**sampling, **own)) for ids in prompts]


def answer(request: Request, results: Sequence[Any], detokenizer: Detokenizer) -> Answer:
    """What vLLM's results of a request's `calls`, in their order, say."""
    prompt_tokens = sum(len(result.prompt_token_ids) for result in results)
    cached_tokens = sum(result.num_cached_tokens or 0 for result in results)
    if request.kind == "embed":
        embeddings = [result.outputs.data.tolist() for result in results]
        return Answer(prompt_tokens, cached_tokens, embeddings=embeddings)
    if request.kind == "score":
        return Answer(prompt_tokens, cached_tokens, scores=_scores(request, results))
    at_once = is_at_once(request.sampling)
    outputs = [
        Output(
            text=detokenizer.text(result.prompt_token_ids, made) if at_once else made.text,
            finish_reason=made.finish_reason or "abort",
            output_tokens=len(made.token_ids),
            logprobs=_logprobs(made.token_ids, made.logprobs) if made.logprobs else None,
        )
        for result in results
        for made in result.outputs
    ]
    return Answer(prompt_tokens, cached_tokens, outputs)


# JSON has no -inf; vLLM's own server gives this number.
_LEAST_LOGPROB = -9999.0
# The most that `logprob_token_ids` takes (`vllm.sampling_params.MAX_LOGPROB_TOKEN_IDS`).
_MOST_LABELS = 128


def _single_tokens(request: Request) -> list[int]:
    """The parts' ids where each is one token, so that one step after the prompt scores them all;
    none where that is not so."""
    if not request.prompt_ids or any(len(part) != 1 for part in request.parts):
        return []
    ids = [part[0] for part in request.parts]
    return ids if 1 < len(ids) <= _MOST_LABELS else []


def _scores(request: Request, results: Sequence[Any]) -> list[list[float]]:
    if labels := _single_tokens(request):
        step = results[0].outputs[0].logprobs[0]
        return [[max(float(step[label].logprob), _LEAST_LOGPROB)] for label in labels]
    start = len(request.prompt_ids)
    return [
        [
            max(float(position[token].logprob), _LEAST_LOGPROB)
            for token, position in zip(part, result.prompt_logprobs[start:], strict=True)
        ]
        for part, result in zip(request.parts, results, strict=True)
    ]


def _logprobs(token_ids: Sequence[int], steps: Sequence[Mapping[int, Any]]) -> list[dict[str, Any]]:
    """The chosen tokens, each with the likeliest ones in order."""
    found = []
    for token_id, step in zip(token_ids, steps, strict=True):
        ranked = sorted(step.values(), key=lambda one: one.rank or 0)
        top = [_likelihood(one) for one in ranked]
        found.append({**_likelihood(step[token_id]), "top": top})
    return found


def _likelihood(one: Any) -> dict[str, Any]:
    return {"token": one.decoded_token or "", "logprob": max(one.logprob, _LEAST_LOGPROB)}
