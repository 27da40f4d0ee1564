"""Predicts from stated numbers and never measures; each number has a unit, a source and a range."""
