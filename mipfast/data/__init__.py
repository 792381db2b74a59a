"""Benchmark data: records, their loaders, and batches made of them."""
