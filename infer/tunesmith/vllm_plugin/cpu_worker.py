"""vLLM's worker on CPUs, for prompts with a seed that are read in several steps."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):
    """Draws nothing from a request's generator before its prompt is read.

    vLLM draws a token in each step of a prompt that it reads in several, throws it away, and sets
    the generator back by its offset, which one of a CPU does not have (vLLM 0.32): the engine
    died, with all that it was at.
    """

    def sample_tokens(self, grammar_output: Any) -> Any:
        runner = self.model_runner
        generators = runner.input_batch.generators
        is_unread = runner.discard_request_mask.np
        kept = {at: generators.pop(at) for at in [*generators] if is_unread[at]}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(kept)
