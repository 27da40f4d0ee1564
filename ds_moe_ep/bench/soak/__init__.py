"""Thousands of steps."""
