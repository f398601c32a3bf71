"""The text of an answer, made of all its tokens at once.

vLLM makes it token by token, which takes time of every step; a stream and stop strings need that,
a finished answer does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Each of these has vLLM look at the text of single tokens, or changes what the text is.
_BY_TOKEN = (
    "detokenize",
    "include_stop_str_in_output",
    "logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
    "stop",
)
_NO_CHARACTER = "\ufffd"


def is_at_once(sampling: Mapping[str, Any]) -> bool:
    """Whether an answer with these arguments of `SamplingParams` needs its text only at the end."""
    return sampling.keys().isdisjoint(_BY_TOKEN)


class Detokenizer:
    """Makes the text that vLLM would have made, for answers that `is_at_once` holds for."""

    def __init__(self, tokenizer: Any) -> None:
        from vllm.v1.engine.detokenizer import uses_fast_detokenizer

        self._tokenizer = tokenizer
        self._is_fast = uses_fast_detokenizer(tokenizer)

    def text(self, prompt_ids: list[int], made: Any) -> str:
        """Of a finished `CompletionOutput`; a token that ended it is no part of the text."""
        ids = list(made.token_ids[:-1] if made.finish_reason == "stop" else made.token_ids)
        text = self._at_once(prompt_ids, ids) if self._is_fast else None
        return self._by_token(prompt_ids, ids) if text is None else text

    def _at_once(self, prompt_ids: list[int], ids: list[int]) -> str | None:
        """None where some bytes make no character: of them the two ways make different ones."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(ids=prompt_ids, skip_special_tokens=True)
        try:
            text: str | None = stream.step(self._tokenizer._tokenizer, ids)
        except Exception:  # the library has no class of its own for a prefix that changes
            return None
        return text if text and _NO_CHARACTER not in text else None

    def _by_token(self, prompt_ids: list[int], ids: list[int]) -> str:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        request = EngineCoreRequest(
            request_id="",
            prompt_token_ids=prompt_ids,
            mm_features=None,
            sampling_params=SamplingParams(),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        made = IncrementalDetokenizer.from_new_request(self._tokenizer, request)
        made.update(ids, stop_terminated=False)
        text: str = made.get_next_output_text(finished=True, delta=False)
        return text
