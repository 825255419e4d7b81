"""From text to training batches: tokenizers, indexed corpora, blending and the order in which samples are seen."""
