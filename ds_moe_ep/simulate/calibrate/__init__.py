"""A cluster's numbers fitted to Records."""
