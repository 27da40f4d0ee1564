"""Layouts in which experts are shared."""
