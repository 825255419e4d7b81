"""Running trained models: loading, generation, and pictures of token depths."""
