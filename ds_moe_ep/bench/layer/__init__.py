"""One layer against DeepSpeed's own."""
