"""Times of the parts of a model for one rank, forward and backward, in microseconds.

T tokens of the rank (of its tensor group), t ranks that share every width, N rows of the rank's experts. Matrix
products cost 2 flops per parameter and row forward and twice that backward (input and weight gradients apart);
elementwise work costs the bytes that it reads and writes. Letters as in sizing/footprint.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.config.training import BYTES, Training
from ds_moe_ep.simulate.cluster.cluster import Device
from ds_moe_ep.simulate.step.formulas import attention_us, matmul_us, memory_us

ADAM_KERNELS = 8  # of a fused step over few tensors: unscale, norm, update, cast
SCORES_BACKWARD = 2.5  # flops of attention's backward pass over its forward pass: scores are computed again


@dataclass(frozen=True)
class LayerCosts:
    """The parts' times for one model on one device; `tp_size` ranks share every width."""

    model: ModelConfig
    moe: MoEConfig
    device: Device
    precision: str
    tp_size: int = 1

    def attention(self, tokens: int, backward: bool = False) -> float:
        """Norm, q, k, v, causal scores and their sum over values, output, residual.

        matmuls 6*D*D/t and 2*D*D/t flops per token, twice backward; scores 2*S*D/t, 2.5 times backward; 12*T*D*b bytes
        of norm, rotation and residual, twice backward.
        """
        D, times = self.model.hidden_size, 2 if backward else 1
        projections = self._matmul(6 * D * D * tokens, tokens, times) + self._matmul(2 * D * D * tokens, tokens, times)
        scores = 2 * self.model.sequence_length * D * tokens / self.tp_size * (SCORES_BACKWARD if backward else 1.0)
        elementwise = self._memory(times * 12 * tokens * D, 4 * times)
        return projections + attention_us(self.device, self.precision, scores) + elementwise

    def gate(self, tokens: int, backward: bool = False) -> float:
        """Norm, logits in fp32, scores, top-k, sort and counters.

        T*(D*(4 + 2*b) + 8*E) bytes and 2*D*E flops per token, twice backward; bytes decide until experts are many. The
        flops go at the peak of fp32, or of the step's precision where the device's file gives none.
        """
        D, E, times = self.model.hidden_size, self.moe.num_experts, 2 if backward else 1
        num_bytes = tokens * (D * (4 + 2 * self._b) + 8 * E)
        precision = "fp32" if self.device.peak_fp32 else self.precision
        logits = times * matmul_us(self.device, precision, 2 * D * E * tokens, tokens)
        return logits + memory_us(self.device, times * num_bytes, 16)

    def permute(self, rows: float) -> float:
        """One gather of rows: 2*N*D*b bytes."""
        return self._memory(2 * rows * self.model.hidden_size, 1)

    def experts(self, rows: float, num_experts: int, passes: int = 1) -> float:
        """All rows of `num_experts` experts through m matrices: 2*m*D*F/t flops per row; backward it is 2 `passes`.

        One of its two products each: input gradients alone, or weight gradients alone, are one pass. The activation
        moves 3*N*F*b bytes forward and as many for its gradient.
        """
        if rows <= 0:
            return 0.0
        m, D, F = self.model.expert_matrices, self.model.hidden_size, self.model.expert_width
        each = rows / num_experts
        products = num_experts * m * self._matmul(2 * D * F * each, each, passes)
        return products + self._memory(3 * rows * F / self.tp_size, num_experts)

    def weight_grads(self, rows: float, num_experts: int) -> float:
        """Weight gradients of all rows: as many flops as forward, no activation."""
        if rows <= 0:
            return 0.0
        m, D, F = self.model.expert_matrices, self.model.hidden_size, self.model.expert_width
        each = rows / num_experts
        return num_experts * m * self._matmul(2 * D * F * each, each, 1)

    def shared_expert(self, tokens: int, backward: bool = False) -> float:
        """An expert that every token visits, cut by t like the others."""
        F, times = self.model.shared_expert_width, 2 if backward else 1
        if not F:
            return 0.0
        m, D = self.model.expert_matrices, self.model.hidden_size
        return m * self._matmul(2 * D * F * tokens, tokens, times) + self._memory(3 * tokens * F / self.tp_size, times)

    def head(self, tokens: int, backward: bool = False) -> float:
        """Last norm, logits (2*V*D flops per token) and the loss over T*V numbers in fp32."""
        D, V, times = self.model.hidden_size, self.model.vocab_size, 2 if backward else 1
        elementwise = memory_us(self.device, times * tokens * (4 * D * self._b + 12 * V), 6 * times)
        return self._matmul(2 * V * D * tokens, tokens, times, shared=False) + elementwise

    def optimizer(self, training: Training, num_parameters: float) -> float:
        """An optimizer step over so many parameters: each is read and written once, memory-bound.

        Bytes of a parameter: gradient read in its precision, fp32 master weight and states read and written, weight
        written in its precision.
        """
        num_bytes = BYTES[training.gradient_precision] + 8 * (1 + training.optimizer_states) + self._b
        return memory_us(self.device, num_bytes * num_parameters, ADAM_KERNELS)

    @property
    def _b(self) -> int:
        return BYTES[self.precision]

    def _matmul(self, flops: float, rows: float, times: int, shared: bool = True) -> float:
        """`times` products of so many flops, cut by t where they are shared out."""
        cut = self.tp_size if shared else 1
        return times * matmul_us(self.device, self.precision, flops / cut, rows)

    def _memory(self, numbers: float, kernels: int) -> float:
        return memory_us(self.device, numbers * self._b, kernels)
