"""Layers that the benchmarks race: DeepSpeed's own, emulated ones."""
