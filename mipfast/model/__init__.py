"""A transformers model as we see it: where its neurons live, what a batch is, how it is patched."""
