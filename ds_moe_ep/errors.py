"""The exceptions that users of the package meet.

    MoEError
    ├── ConfigError      a knob has a value that cannot work        (also a ValueError)
    ├── TopologyError    ranks, groups and experts do not fit       (also a ValueError)
    └── EngineError      DeepSpeed, a group or a rank is not as the layer needs it  (also a RuntimeError)
        ├── PeerError    another rank did not answer, went, or failed
        └── ExportError  a model file would not hold all experts    (also a ValueError)

Every message has the form `path=value: the rule; the way out`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoEError(Exception):
    """Root of the package's exceptions."""


class ConfigError(MoEError, ValueError):
    """A knob has a value that cannot work."""


class TopologyError(MoEError, ValueError):
    """Ranks, groups and experts do not fit each other."""


class EngineError(MoEError, RuntimeError):
    """DeepSpeed, a process group or another rank is not as the layer needs it."""


class PeerError(EngineError):
    """Another rank did not answer, went, or failed: the message says which one, in what, and why.

    `is_secondary`: it only tells of that rank's end. A rank that lives, and is somewhere else, does not tell of itself.
    """

    is_secondary = True


class ExportError(EngineError, ValueError):
    """A model file would hold the experts of one rank in the place of all."""


def nearest(name: str, known: Iterable[str], kind: str = "keys") -> str:
    """`"did you mean 'x'?"` for the closest known name, or the list of all, called `kind`, when none is close."""
    names = sorted(known)
    close = closest(name, names)
    return f"did you mean {close!r}?" if close else f"known {kind}: {', '.join(names)}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that comes closest to `name`; None where none is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)
