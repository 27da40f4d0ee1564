"""Layouts of DeepSpeed's in which experts are shared: pipeline stages, tensor parallelism of the dense part."""
