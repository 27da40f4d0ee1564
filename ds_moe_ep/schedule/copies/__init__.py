"""Copies of hot experts: the loads to expect, and which ranks' slots take which expert."""
