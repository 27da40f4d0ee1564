"""Graphs of autograd's that experts of unknown mathematics make inside of a pass."""
