"""Schedules on shaped links."""
