"""Verification of a training engine: does it train what its user thinks it trains?"""
