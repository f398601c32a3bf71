"""vLLM: the one place that knows its arguments, its environment and its traps.

Nothing here imports it before an engine is opened.
"""

from tunesmith.engine.offline import close_llm, lora_request, open_llm, prepare_process
from tunesmith.engine.places import Place, find_places
from tunesmith.engine.pool import Crashed, EnginePool
from tunesmith.engine.requests import Answer, Kind, Output, Request
from tunesmith.engine.server import EngineServer
from tunesmith.engine.spec import EngineSpec, engine_spec
from tunesmith.engine.stream import stream

__all__ = [
    "Answer",
    "Crashed",
    "EnginePool",
    "EngineServer",
    "EngineSpec",
    "Kind",
    "Output",
    "Place",
    "Request",
    "close_llm",
    "engine_spec",
    "find_places",
    "lora_request",
    "open_llm",
    "prepare_process",
    "stream",
]
