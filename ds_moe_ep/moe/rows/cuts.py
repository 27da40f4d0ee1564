"""Buffers of rows cut into parts: where messages end, and where products do. Each buffer is cut by one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Span = tuple[int, int]  # start, stop


class Cuts(NamedTuple):
    """A buffer cut into spans: their lengths in order, and the place of each by its first row."""

    lengths: list[int]
    place_of: dict[int, int]
    num_rows: int

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Cuts | None:
        """The cuts at these spans, none of them empty; None where they leave rows out, or have some twice."""
        found = sorted(spans)
        ends = [0, *[stop for _, stop in found]]
        if [start for start, _ in found] != ends[:-1]:
            return None
        return cls([stop - start for start, stop in found], {start: i for i, start in enumerate(ends)}, ends[-1])


class MessageCuts(NamedTuple):
    """A buffer cut at the ends of all messages that have rows: the lengths of its parts in order.

    Of each piece: the places among them of the rank's own rows, and (place, peer) of those of other ranks.
    """

    lengths: list[int]
    pieces: list[tuple[list[int], list[tuple[int, int]]]]
    num_rows: int

    @classmethod
    def of(cls, spans_of_pieces: Sequence[Sequence[tuple[int, Span]]], rank: int) -> MessageCuts | None:
        """The cuts at these spans, by piece and peer; None where they leave rows out, or have some twice."""
        cuts = Cuts.of([span for spans in spans_of_pieces for _, span in spans if span[0] < span[1]])
        if cuts is None:
            return None
        lengths, place_of, num_rows = cuts
        pieces = [
            (
                [place_of[start] for peer, (start, stop) in spans if peer == rank and start < stop],
                [(place_of[start], peer) for peer, (start, stop) in spans if peer != rank and start < stop],
            )
            for spans in spans_of_pieces
        ]
        return cls(lengths, pieces, num_rows)
