"""The rows of a pass, and the places through which they go."""
