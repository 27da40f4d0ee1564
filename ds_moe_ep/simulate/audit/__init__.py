"""The reference job's figures, simulated and judged."""
