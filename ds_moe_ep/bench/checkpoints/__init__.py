"""Seconds and memory of models that come from files and go into files."""
