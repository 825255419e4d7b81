"""From text to training batches: tokenizers, indexed corpora, blends, and the order of samples."""
