"""Shadow mode: now and then one layer is computed again by a blocking path, and compared."""
