"""Times of the parts of a model for one rank, forward and backward, in microseconds.

T tokens of the rank (of its tensor group), t ranks that share a part's width, N rows of the rank's experts. Matrix
products cost 2 flops per parameter and row forward and twice that backward (input and weight gradients apart);
elementwise work costs the bytes that it reads and writes, as kernels/traffic.py counts them: those of Triton's kernels
on devices, those of plain torch on a host and with "kernels": "torch". Letters as in sizing/footprint.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.config.training import BYTES, Training
from ds_moe_ep.kernels.attention_path import AttentionPath, BlockedAttention, attention_path
from ds_moe_ep.kernels.traffic import LeastTraffic, OperationSizes, plain_traffic, traffic
from ds_moe_ep.simulate.cluster.cluster import Device
from ds_moe_ep.simulate.step.formulas import attention_us, matmul_us, memory_us, product_us
from ds_moe_ep.simulate.step.shares import WHOLE_WIDTHS, Shares

ADAM_KERNELS = 8  # of a fused step over few tensors: unscale, norm, update, cast
SCORES_BACKWARD = 2.5  # flops of attention's backward pass over its forward pass: scores are computed again


@dataclass(frozen=True)
class Product:
    """`count` alike matrix products of so many flops each. `rows` is the smaller side; `num_bytes` are of results."""

    flops: float
    rows: float
    count: float = 1.0
    num_bytes: float = 0.0  # that move beside operands and take the time of the product where they take longer
    precision: str = ""  # where it is not the step's


@dataclass(frozen=True)
class LayerCosts:
    """The parts' times for one model on one device; `shares` says how many ranks share each width.

    Each part is told to `spend`: its products, and the bytes and launches beside them.
    """

    model: ModelConfig
    moe: MoEConfig
    device: Device
    precision: str
    shares: Shares = WHOLE_WIDTHS
    on_host: bool = False  # it computes on a host's cores

    @property
    def path(self) -> AttentionPath:
        """Way that attention runs."""
        return attention_path(self.model.head_size, "cpu" if self.on_host else "cuda")

    def attention(self, tokens: int, backward: bool = False) -> float:
        """Norm, q, k, v, rotation, causal scores and their sum over values, output, residual.

        matmuls 6*D*D/t and 2*D*D/t flops per token, twice backward; 5*T*D*b bytes of norm and residual, 8 backward.
        """
        D, times = self.model.hidden_size, 2 if backward else 1
        t = self.shares.attention
        own = tokens * D // t  # numbers of this rank's heads
        shape = self.model.attention
        sizes = [columns * width for columns, width in (*shape.inputs, shape.output)]
        projections = [Product(2 * size * tokens / t, tokens, times) for size in sizes]
        turned = self._counted(f"rotation {_phase(backward)}", tokens)
        elementwise = self.spend("norms", (), (8 if backward else 5) * tokens * D * self._b, 3 if backward else 2)
        elementwise += self.spend("rotation", (), turned.num_bytes / t, turned.num_launches)
        return self.spend("projections", projections) + self._scores(tokens, own, backward) + elementwise

    def _scores(self, tokens: int, own: int, backward: bool) -> float:
        """Scores and their sum over values, as `path` says.

        flash    2*S*D*T/t flops, 2.5 times backward, in one kernel
        blocks   products with all scores up to a block's end, two forward and five backward, each slowed to what its
                 scores take in memory; and between them the passes over scores that BlockedAttention counts
        """
        S = self.model.sequence_length
        if self.path != "blocks":
            scores = S * tokens * self.model.attention.scores_width / self.shares.attention
            flops = scores * (SCORES_BACKWARD if backward else 1.0)
            return self.spend("scores", attention_flops=flops)
        shares, head_size = self.shares, self.model.head_size
        found = BlockedAttention(
            num_sequences=tokens * shares.sequences // S,  # whole ones, of a part of the heads
            num_heads=self.model.num_heads // (shares.attention * shares.sequences),
            num_tokens=S,
            head_size=head_size,
            item_bytes=self._b,
        )
        count, blocks = 5 if backward else 2, len(found.blocks)
        each = Product(
            found.product_flops() / blocks,
            min(found.per_block, head_size),
            count * blocks,
            found.product_bytes(backward) / (count * blocks),
        )
        copies = 2 * own * self._b  # heads side by side again
        return self.spend(
            "scores", [each], found.elementwise_bytes(backward) + copies, found.num_launches(backward) + 1
        )

    def gate(self, tokens: int, backward: bool = False) -> float:
        """Norm, logits with scores and top-k, sort; backward also the sum of the tokens' gradients.

        2*T*D*b bytes of the norm, 8 backward with the residual's; the residual is added where results are summed, on a
        tensor group in a pass of its own (3*T*D*b), and beside experts that it shares a shared expert's output in
        another. 2*D*E flops per token, twice backward, beside the bytes of the
        gate's kernels: what takes longer counts. The flops go at the peak of fp32, or of the step's precision where the
        device's file gives none.
        """
        D, E, times = self.model.hidden_size, self.moe.num_experts, 2 if backward else 1
        unit = tokens * D * self._b
        shares, has_shared = self.shares, bool(self.model.shared_expert_width)
        added = shares.adds_apart + (shares.tokens > 1 and has_shared)
        norms = self.spend("norms", (), (8 if backward else 2 + 3 * added) * unit, 3 if backward else 1 + added)
        counted = self._counted(f"gate {_phase(backward)}", tokens)
        precision = "fp32" if self.device.peak_fp32 else self.precision
        logits = Product(2 * D * E * tokens, tokens, times, counted.num_bytes / times, precision)
        products = self.spend("gate", [logits], 0.0, counted.num_launches - times)
        if backward:
            copies = 3 + 3 * has_shared
            return norms + products + self.spend("sum of gradients", (), copies * unit, copies // 3)
        ordered = self._counted("sort", tokens)
        return norms + products + self.spend("sort", (), ordered.num_bytes, ordered.num_launches)

    def permute(self, tokens: int, backward: bool = False) -> float:
        """Rows into send order, or their gradients back at their tokens."""
        found = self._counted(f"permute {_phase(backward)}", tokens)
        return self.spend("permute", (), found.num_bytes, found.num_launches)

    def unpermute(self, tokens: int, backward: bool = False) -> float:
        """The weighted sum of each token's rows, shared expert's output and residual; or its gradients by rows."""
        found = self._counted(f"unpermute {_phase(backward)}", tokens)
        return self.spend("unpermute", (), found.num_bytes, found.num_launches)

    def own_rows(self, rows: float, pieces: int) -> float:
        """Copies of the rank's rows to itself, there and back: 4*N*D*b bytes."""
        return self.spend("own rows", (), 4 * rows * self.model.hidden_size * self._b, 2 * pieces) if rows else 0.0

    def moves(self, rows: float) -> float:
        """Received rows into the order of experts and results out of it: 4*N*D*b bytes."""
        return self.spend("moves", (), 4 * rows * self.model.hidden_size * self._b, 2)

    def experts(self, rows: float, num_runs: float, *, is_grouped: bool = False) -> float:
        """Rows through m matrices, a product per run: 2*m*D*F/t flops per row, and the activation.

        A grouped product computes all runs in one launch, each at the rate of its rows.
        """
        by = self.shares.experts
        return self._experts("experts", rows, num_runs, self.model.expert, self.model.expert_width, by, is_grouped)

    def input_grads(self, rows: float, num_runs: float, *, is_grouped: bool = False) -> float:
        """Their way back: as many flops, the activation's gradient, and active rows where they are made again.

        Grouped products cannot add to each other: a SwiGLU's two are summed apart, 3*N*D*b bytes.
        """
        width, sums = self.model.expert_width, 0.0
        if is_grouped and self.model.expert == "swiglu":
            sums = self.spend("input gradients", (), 3 * rows * self.model.hidden_size * self._b, 1)
        activation, by = self._activation_backward, self.shares.experts
        return sums + self._experts("input gradients", rows, num_runs, activation, width, by, is_grouped)

    def weight_grads(
        self, rows: float, num_runs: float, *, is_only: bool = True, is_grouped: bool = False, num_pieces: int = 1
    ) -> float:
        """Weight gradients of all rows: as many flops as forward. One of several products adds to a sum in fp32.

        Grouped ones want rows by expert: where there are several pieces, 2*N*b*(2*D + m*F) bytes bring them there.
        """
        if rows <= 0:
            return 0.0
        m, D, F = self.model.expert_matrices, self.model.hidden_size, self.model.expert_width
        each, num_products, t = rows / num_runs, 1 if is_grouped else num_runs, self.shares.experts
        sums = 0.0 if is_only else 8 * D * F / t
        products = [Product(2 * D * F * rows / num_products / t, each, num_products * m, sums)]
        moved = is_grouped and num_pieces > 1
        num_bytes = moved * 2 * rows * self._b * (2 * D + m * F)
        return self.spend("weight gradients", products, num_bytes, moved * (2 + m * num_pieces))

    def cast_weight_grads(self, num_experts: int) -> float:
        """Sums in fp32 in the weights' own type, once they are whole: 4 + b bytes per parameter."""
        if self._b == 4:
            return 0.0
        numbers = num_experts * self.model.expert_params / self.shares.experts
        return self.spend("weight gradients", (), (4 + self._b) * numbers, num_experts * self.model.expert_matrices)

    def shared_expert(self, tokens: float, backward: bool = False) -> float:
        """An expert that every token visits; its weight gradients are apart."""
        F = self.model.shared_expert_width
        if not F or not tokens:
            return 0.0
        activation = self._activation_backward if backward else self.model.expert
        return self._experts("shared expert", tokens, 1, activation, F, self.shares.shared_expert)

    def shared_weight_grads(self, tokens: float) -> float:
        """The weight gradients of the shared expert."""
        F = self.model.shared_expert_width
        if not F:
            return 0.0
        D, m = self.model.hidden_size, self.model.expert_matrices
        return self.spend("shared expert", [Product(2 * D * F * tokens / self.shares.shared_expert, tokens, m)])

    def head(self, tokens: int, backward: bool = False) -> float:
        """Embedding, last norm, logits (2*V*D flops per token) and the loss over T*V numbers in fp32.

        Loss: a cast where they are no fp32 (4 + b bytes), log-softmax (8); backward the gradient of the choice (4), of
        the log-softmax (12), and a cast.
        """
        D, V, times = self.model.hidden_size, self.model.vocab_size, 2 if backward else 1
        cast = 4 + self._b if self._b < 4 else 0
        loss = (16 if backward else 8) + cast
        t = self.shares.head
        rows = tokens * (6 if backward else 4) * D * self._b + backward * V * D * self._b / t
        products = [Product(2 * V * D * tokens / t, tokens, times)]
        return self.spend("head", products, rows + tokens * V * loss / self.shares.loss, 6 * times)

    def optimizer(self, training: Training, num_parameters: float) -> float:
        """An optimizer step over so many parameters: each is read and written once, memory-bound.

        Bytes of a parameter: gradient read in its precision, fp32 master weight and states read and written, weight
        written in its precision.
        """
        num_bytes = BYTES[training.gradient_precision] + 8 * (1 + training.optimizer_states) + self._b
        return memory_us(self.device, num_bytes * num_parameters, ADAM_KERNELS)

    def spend(
        self,
        part: str,
        products: tuple[Product, ...] | list[Product] = (),
        num_bytes: float = 0.0,
        num_launches: float = 0.0,
        attention_flops: float = 0.0,
    ) -> float:
        """Microseconds of a part: its products, what moves beside them, and the flops of a flash kernel."""
        found_us = attention_us(self.device, self.precision, attention_flops)
        found_us += memory_us(self.device, num_bytes, num_launches)
        for product in products:
            precision = product.precision or self.precision
            one_us = matmul_us(self.device, precision, product.flops, product.rows)
            found_us += product.count * product_us(self.device, one_us, product.num_bytes)
        return found_us

    @property
    def _b(self) -> int:
        return BYTES[self.precision]

    @property
    def _activation_backward(self) -> str:
        """A recomputation keeps the active rows; without one they are made again."""
        return f"{self.model.expert} backward" + (", active rows kept" if self.model.recompute else "")

    def _experts(
        self, part: str, rows: float, num_runs: float, activation: str, width: int, by: int, is_grouped: bool = False
    ) -> float:
        """Products of one way through an expert whose width `by` ranks share, and its activation."""
        if rows <= 0:
            return 0.0
        m, D = self.model.expert_matrices, self.model.hidden_size
        num_products = 1 if is_grouped else num_runs
        counted = self._counted(activation, 1, width)
        products = [Product(2 * D * width * rows / num_products / by, rows / num_runs, num_products * m)]
        return self.spend(part, products, rows * counted.num_bytes / by, num_products * counted.num_launches)

    def _counted(self, operation: str, tokens: int, width: int = 0) -> LeastTraffic:
        """Traffic of an operation as it runs here; a width asks for that of so many rows instead of their choices."""
        sizes = OperationSizes(
            num_tokens=tokens,
            width=self.model.hidden_size,
            num_choices=1 if width else self.moe.top_k,
            num_experts=self.moe.num_experts,
            expert_width=width,
            item_bytes=self._b,
            num_added=self._num_added,
        )
        is_plain = self.on_host or self.moe.kernels == "torch"
        return (plain_traffic if is_plain else traffic)(operation, sizes)

    @property
    def _num_added(self) -> int:
        """Tensors that are added where results are summed: the shared expert's output, the residual."""
        shares = self.shares
        return int(self.model.shared_expert_width > 0 and shares.tokens == 1) + (not shares.adds_apart)


def _phase(backward: bool) -> str:
    return "backward" if backward else "forward"
