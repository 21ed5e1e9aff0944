"""Text from a trained model: sampling, and the engine that answers many requests together."""

from lfm_jax.generation.engine import MOST_TOP_LOG_PROBS, Engine, EngineConfig
from lfm_jax.generation.loops import LoopConfig, LoopDetector
from lfm_jax.generation.requests import Completion, FinishReason, Request, Update
from lfm_jax.generation.sampling import SamplingConfig
from lfm_jax.generation.text import TextStream

__all__ = [
    "MOST_TOP_LOG_PROBS", "Completion", "Engine", "EngineConfig", "FinishReason", "LoopConfig", "LoopDetector", "Request",
    "SamplingConfig", "TextStream", "Update",
]
