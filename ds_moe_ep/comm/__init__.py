"""Moves rows between ranks and hands back a handle: never sorts, never computes, never picks its group."""
