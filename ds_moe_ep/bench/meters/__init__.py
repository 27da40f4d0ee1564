"""Memory, traffic and busy time of a process."""
