"""Routes of passes, recorded and replayed."""
