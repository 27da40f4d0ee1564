"""A cluster as data."""
