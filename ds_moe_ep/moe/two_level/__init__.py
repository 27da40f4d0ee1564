"""One copy of a token per far node: it crosses the far link once, and is spread inside of the node."""
