"""The `engine` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.config.schema.base import Positive, Section


class Engine(Section):
    """vLLM, as evaluation, batch, serving and benchmarks start it."""

    max_model_len: Positive | None = None
    """Longest prompt plus answer, in tokens; the model's own limit when null."""

    max_num_seqs: Positive = 64
    """Sequences decoded together."""

    max_num_batched_tokens: Positive | None = None
    """Tokens computed in one pass, prompts and answers together; vLLM's own choice when null."""

    enable_chunked_prefill: bool = True
    """Cut long prompts, so that answers go on beside them."""

    enable_prefix_caching: bool = True
    """Keep keys and values of prompts for those that begin alike."""

    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Precision of the key-value cache: the model's, or half of that."""

    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of GPU memory the engine may take."""

    kv_cache_gib: Annotated[float, Field(gt=0.0)] = 1.0
    """Size of the key-value cache on a CPU."""

    tensor_parallel_size: Positive = 1
    """GPUs that share one copy of the model."""

    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: faster start, slower decoding. CPUs always skip them."""

    start_timeout_s: Positive = 600
    """How long a model may take to load."""
