"""The language model on Megatron-core layers (`mor_model`), and kernels that need PyTorch alone (`elementwise`)."""
