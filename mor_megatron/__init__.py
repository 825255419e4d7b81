"""MoR-Megatron: Mixture-of-Recursions (arXiv 2507.10524) on Megatron-core layers and the DeepSpeed engine."""

import warnings

__version__ = "0.1.0"

# Megatron-core and DeepSpeed tell every process that GPU packages are missing and calls are old. What is missing and
# matters is printed by pretraining/capabilities.py.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|full scope|_tensor` is deprecated).*")
