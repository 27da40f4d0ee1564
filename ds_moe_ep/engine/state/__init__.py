"""An engine's training state, and what its optimizer sees: read, kept and put back."""
