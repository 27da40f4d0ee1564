"""Way in which causal attention runs, and its blocks of queries, by sizes alone. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

AttentionPath = Literal["torch", "flash", "blocks"]

PATHS: dict[AttentionPath, str] = {
    "torch": "torch's own kernel",
    "flash": "a flash kernel",
    "blocks": "blocks of queries as batched products",
}
MAX_FLASH_HEAD = 256
BLOCK_BYTES = 2**29  # of the scores of one block
MIN_QUERIES = 16  # of a block


def attention_path(head_size: int, device_type: str) -> AttentionPath:
    """Way that attention is computed: torch's choice on a CPU, and on CUDA a flash kernel or blocks of queries.

    Flash kernels end at heads of 256. For wider ones torch would fall back to a kernel whose tiles are too narrow to
    feed tensor cores.
    """
    if device_type != "cuda":
        return "torch"
    return "flash" if head_size <= MAX_FLASH_HEAD else "blocks"


def queries_per_block(num_sequences: int, num_heads: int, num_tokens: int) -> int:
    """Queries of one block, so that its scores take at most BLOCK_BYTES."""
    return max(MIN_QUERIES, BLOCK_BYTES // max(4 * num_sequences * num_heads * num_tokens, 1))


def query_blocks(num_tokens: int, per_block: int) -> list[tuple[int, int]]:
    """First and last query (not included) of each block; its keys are all up to the last."""
    return [(start, min(start + per_block, num_tokens)) for start in range(0, num_tokens, per_block)]


@dataclass(frozen=True, kw_only=True)
class BlockedAttention:
    """Counts of attention by blocks of queries: its scores, and the bytes that move for them.

    Scores are made in fp32 and read as shares in the tensors' own type. Bytes of what a product reads and writes are
    those of its scores, and of sums in fp32 that it adds to; queries, keys and values themselves are left out.
    """

    num_sequences: int
    num_heads: int
    num_tokens: int  # of one sequence
    head_size: int
    item_bytes: int = 2

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """Queries of each block."""
        return query_blocks(self.num_tokens, self.per_block)

    @property
    def per_block(self) -> int:
        """Queries of a whole block."""
        return queries_per_block(self.num_sequences, self.num_heads, self.num_tokens)

    @cached_property
    def num_scores(self) -> int:
        """Scores of all blocks, those behind a query in its own block too."""
        return self._heads * sum((end - start) * end for start, end in self.blocks)

    def product_flops(self) -> int:
        """Operations of one product with all scores; forward has two, backward five."""
        return 2 * self.head_size * self.num_scores

    def product_bytes(self, backward: bool) -> int:
        """Bytes that products move: scores out, shares in; backward scores and their gradients, and sums of keys'."""
        b = self.item_bytes
        if not backward:
            return (4 + b) * self.num_scores
        sums = 2 * 8 * self.head_size * self._heads * sum(end for _, end in self.blocks)
        return (4 + b + 4 + b + b) * self.num_scores + sums

    def elementwise_bytes(self, backward: bool) -> int:
        """Bytes between products: mask, softmax, its gradient, casts; results put in place, sums cast at the end."""
        b, rows = self.item_bytes, self._heads * self.num_tokens * self.head_size
        cast = 4 + b if b < 4 else 0
        scores = (8 + cast) * self.num_scores + 8 * self._heads * sum((end - start) ** 2 for start, end in self.blocks)
        if not backward:
            return scores + 2 * b * rows
        return scores + (12 + cast) * self.num_scores + (4 * b + 2 * 4 + 2 * cast) * rows

    def num_launches(self, backward: bool) -> int:
        """Launches beside the products."""
        return (12 if backward else 7) * len(self.blocks) + 4 * backward

    @property
    def _heads(self) -> int:
        return self.num_sequences * self.num_heads
