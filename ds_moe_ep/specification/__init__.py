"""The reference job: its figures as stated, as derived, and judged."""
