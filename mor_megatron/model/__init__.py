"""The language model on Megatron-core layers."""

from mor_megatron.model.mor_model import MoRModel, build_model

__all__ = ["MoRModel", "build_model"]
