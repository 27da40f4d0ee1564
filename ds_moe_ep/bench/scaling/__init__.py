"""Expert parallelism of 1 to 16 ranks."""
