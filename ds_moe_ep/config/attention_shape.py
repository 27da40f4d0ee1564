"""Widths of a layer's attention, which its parameters, its arithmetic and its scores follow from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The projections (columns in, columns out) before the scores and behind them, and the widths of all heads."""

    inputs: tuple[tuple[int, int], ...]
    output: tuple[int, int]
    key_width: int  # of queries and keys as scores meet them, all heads
    value_width: int
    saved_width: int  # columns per token that the backward pass finds, beside the layer's input

    @classmethod
    def whole(cls, hidden_size: int) -> AttentionShape:
        """Heads that share the width of a token, each with keys and values of its own: 4*D*D parameters.

        Saved: q, k, v, rotated q and k, the heads' output twice (by head, and side by side).
        """
        D = hidden_size
        return cls(inputs=((D, 3 * D),), output=(D, D), key_width=D, value_width=D, saved_width=7 * D)

    @classmethod
    def grouped(
        cls, hidden_size: int, num_heads: int, num_key_value_heads: int, head_size: int, has_norms: bool = False
    ) -> AttentionShape:
        """Heads that share keys and values (GQA, arXiv 2305.13245), perhaps with norms of queries and keys, as Qwen3.

        Saved: as of `whole`; with norms their results too, and the heads' output once.
        """
        width = num_heads * head_size
        columns = (num_heads + 2 * num_key_value_heads) * head_size
        turned = (num_heads + num_key_value_heads) * head_size
        return cls(
            inputs=((hidden_size, columns),),
            output=(width, hidden_size),
            key_width=width,
            value_width=width,
            saved_width=columns + (1 + has_norms) * turned + (2 - has_norms) * width,
        )

    @classmethod
    def latent(
        cls,
        hidden_size: int,
        num_heads: int,
        *,
        query_rank: int,
        key_value_rank: int,
        plain_size: int,
        rotated_size: int,
        value_size: int,
    ) -> AttentionShape:
        """Keys and values of all heads from one latent vector (MLA, arXiv 2405.04434, section 2.1).

        A head's queries and keys have `plain_size` columns from latent vectors and `rotated_size` that turn by
        position; those of the keys are one set for all heads.

        Saved: latent vectors before and behind their norms, q and k of all heads as scores meet them, what keys and
        values are made from, the heads' output twice.
        """
        key_size = plain_size + rotated_size
        down = (hidden_size, query_rank + key_value_rank + rotated_size)
        queries = (query_rank, num_heads * key_size)
        keys_and_values = (key_value_rank, num_heads * (plain_size + value_size))
        key_width, value_width = num_heads * key_size, num_heads * value_size
        latents = down[1] + query_rank + key_value_rank
        return cls(
            inputs=(down, queries, keys_and_values),
            output=(value_width, hidden_size),
            key_width=key_width,
            value_width=value_width,
            saved_width=latents + 2 * key_width + keys_and_values[1] + 2 * value_width,
        )

    @property
    def input_params(self) -> int:
        """Parameters of the projections before the scores."""
        return sum(columns * width for columns, width in self.inputs)

    @property
    def params(self) -> int:
        """Parameters of one layer's attention."""
        return self.input_params + self.output[0] * self.output[1]

    @property
    def scores_width(self) -> int:
        """Columns that the two products of attention meet per query and key: 2*D where heads share the width."""
        return self.key_width + self.value_width
