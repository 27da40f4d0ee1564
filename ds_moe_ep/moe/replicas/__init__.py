"""Copies of hot experts on ranks that have less to do: same routes, same gradients, less time."""
