"""Looks at a checkpoint before it is loaded, and reads it without a second copy in memory."""
