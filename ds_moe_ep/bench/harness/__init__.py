"""What the benchmarks share: method, processes, collected samples."""
