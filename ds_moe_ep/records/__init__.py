"""Evidence: Records, their names, and where they come from."""
