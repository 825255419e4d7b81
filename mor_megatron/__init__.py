"""MoR-Megatron: Mixture-of-Recursions (arXiv 2507.10524) on Megatron-core layers and the DeepSpeed engine."""

__version__ = "0.1.0"
