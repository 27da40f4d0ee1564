"""Measures by one method and writes Records; nothing here decides what is good."""
