"""The inference engine: continuous depth-wise batching over paged keys and values (docs/serving.md)."""

from mor_megatron.serving.engine import Engine, Status
from mor_megatron.serving.llm import LLM, Completion
from mor_megatron.serving.options import EngineOptions
from mor_megatron.serving.request import Event, Logprob, Request, SamplingParams

__all__ = ["LLM", "Completion", "Engine", "EngineOptions", "Event", "Logprob", "Request", "SamplingParams", "Status"]
