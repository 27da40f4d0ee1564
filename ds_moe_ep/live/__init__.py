"""A run as it goes: the lines that rank 0 writes, the folder that they lie in, and the page that shows them."""
