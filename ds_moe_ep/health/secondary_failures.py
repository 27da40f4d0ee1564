"""Messages of communicators that tell of another rank's end: secondary failures, whose cause is on that rank.

When a rank dies, its peers fail too, each with a message of the communicator about a connection. Whoever looks for the
cause of a failed job (the diagnosis of the ranks, the doctor's trial of the links) puts these last. They are pieces of
text that torch does not promise: read from the libraries of the release below, and to be read again with another one.
"""

from __future__ import annotations

READ_FROM = "torch 2.13.0"  # libtorch_cpu.so with gloo, and the names that its NCCL backend gives to results

GLOO = (
    "Connection closed by peer",
    "Connection reset by peer",  # the system's words for a socket's error, as the next one
    "Broken pipe",
    "pair closure",  # "Application timeout caused pair closure": another wait on this rank has closed the connection
    "Timed out waiting",  # for a receive or a send
    "timed out connecting",
)
NCCL = (
    "ncclRemoteError",
    "Connection closed by remote peer",  # its socket's words, behind "Last error:"
)
# The package's own refusal of a pass, which each peer of the rank that refused raises too.
REFUSED = "refused its input: its own error says why"

MESSAGES = (*GLOO, *NCCL, REFUSED)


def is_secondary_message(text: str) -> bool:
    """True where an error's text only tells that another rank has gone, stalled or failed."""
    return any(message in text for message in MESSAGES)
