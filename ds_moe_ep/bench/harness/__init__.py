"""Shared by the benchmarks: method, processes, collected samples, one frame."""
