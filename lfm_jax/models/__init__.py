"""Configurations, presets and the NNX modules of the hybrid decoder."""

from lfm_jax.models.cache import DecoderCache
from lfm_jax.models.config import ComputeConfig, LayerType, ModelConfig, MoEConfig, RopeConfig
from lfm_jax.models.decoder import Decoder, DecoderOutput
from lfm_jax.models.functional import FunctionalModel, functional
from lfm_jax.models.operators import init_cache
from lfm_jax.models.presets import PRESETS, preset
from lfm_jax.models.quantization import QuantizedWeight

__all__ = [
    "PRESETS", "ComputeConfig", "Decoder", "DecoderCache", "DecoderOutput", "FunctionalModel", "LayerType", "MoEConfig",
    "ModelConfig", "QuantizedWeight", "RopeConfig", "functional", "init_cache", "preset",
]
