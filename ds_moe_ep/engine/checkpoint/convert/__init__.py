"""Checkpoints carried to another size, layout or form without ranks: read, checked, written file by file, resumable."""
