"""What a training step reads: indexed files, orders, mixtures, samples with meta-tokens, the loader."""
