"""Links between ranks, tried and judged."""
