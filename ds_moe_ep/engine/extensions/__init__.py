"""What goes along with an engine."""
