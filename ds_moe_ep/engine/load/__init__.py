"""The experts' load of an engine: what is seen of it, gathered once per report, and to whom it is told."""
