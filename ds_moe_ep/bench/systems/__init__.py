"""Whole systems in one world."""
