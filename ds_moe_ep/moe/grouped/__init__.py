"""One matrix product for all experts of a rank: when it is made, and the pass that makes it."""
