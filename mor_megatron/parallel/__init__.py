"""Process groups and what Megatron-core needs to run without CUDA."""
