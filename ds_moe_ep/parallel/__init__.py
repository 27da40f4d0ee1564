"""Functions (model, group) -> model on the one-device model: tensor parallelism and pipeline stages."""
