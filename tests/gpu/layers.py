"""The layer that the one-GPU check runs, the dense expert that it must equal, and how long work takes on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel
from tests.gpu.mirror import TORUS, Fault, Links, MirroredTransport


@dataclass(frozen=True)
class Sizes:
    """Tokens T, width D and expert width F of a run, and where it runs."""

    num_tokens: int
    hidden_size: int
    width: int
    device: torch.device
    dtype: torch.dtype

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_small(self) -> bool:
        return self.num_tokens < 1000

    @property
    def bound(self) -> float:
        """The largest relative error, in norm: the type's unit through four products behind each other."""
        return 2e-3 if self.dtype == torch.float16 else 5e-6

    @property
    def product_flops(self) -> int:
        """Operations of the two products of a forward pass."""
        return 4 * self.num_tokens * self.hidden_size * self.width

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens [T, D] and gradients of outputs [T, D]."""
        shape = (self.num_tokens, self.hidden_size)
        return (
            torch.randn(shape, device=self.device).to(self.dtype),
            torch.randn(shape, device=self.device).to(self.dtype),
        )


def sizes(small: bool) -> Sizes:
    """The reference job's sizes on a GPU in fp16, or sizes that a CPU runs in seconds in fp32."""
    if torch.cuda.is_available():
        device, dtype = torch.device("cuda"), torch.float16
    else:
        device, dtype = torch.device("cpu"), torch.float32
    if small or device.type == "cpu":
        return Sizes(512, 64, 128, device, dtype)
    return Sizes(10000, 8192, 32768, device, dtype)


def make_layer(
    of: Sizes,
    schedule: str,
    *,
    links: Links = "pcie",
    kind: type[nn.Module] = GeluMLP,
    top_k: int = 1,
    jitter_cycles: int = 0,
    fault: Fault = "",
    **knobs: Any,
) -> ExpertParallel:
    """The layer of virtual rank 0: drawn routes, even over the experts, on the mirrored torus."""
    torch.manual_seed(0)
    config = MoEConfig(
        num_experts=TORUS.size, ep_size=TORUS.size, top_k=top_k, renormalize=False, schedule=schedule, **knobs
    )
    with torch.device(of.device):
        layer = ExpertParallel(of.hidden_size, kind(of.hidden_size, of.width), config).to(of.dtype)
    layer.connect(MirroredTransport(links, jitter_cycles, fault), TORUS)
    generator = torch.Generator().manual_seed(5)
    ids_TK = torch.stack([torch.randperm(TORUS.size, generator=generator)[:top_k] for _ in range(of.num_tokens)])
    ids_TK = ids_TK.to(of.device)
    layer.gate._takes_one_pass = lambda *_: False  # type: ignore[method-assign]  # which would choose by the scores
    layer.gate._choose = lambda logits_TE: ids_TK  # type: ignore[method-assign,assignment]
    return layer


def dense(layer: ExpertParallel, x_TD: Tensor) -> Tensor:
    """The outputs [T, D] by one expert that every token visits, weighted as the layer weighs its choices."""
    expert = layer.experts.deepspeed_experts[0]
    weight_T1 = layer.gate(x_TD).weights_TK.sum(1, keepdim=True)
    return (expert(x_TD).float() * weight_T1).to(x_TD.dtype)


def gradients(layer: ExpertParallel, run: Callable[[Tensor], Tensor], x_TD: Tensor, dy_TD: Tensor) -> list[Tensor]:
    """The outputs of `run` and all gradients: of the tokens, then of the layer's parameters."""
    layer.zero_grad(set_to_none=True)
    tokens_TD = x_TD.clone().requires_grad_()
    y_TD = run(tokens_TD)
    y_TD.backward(dy_TD)
    assert tokens_TD.grad is not None
    return [y_TD.detach(), tokens_TD.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the norm; not a number anywhere is infinite."""
    found, expected = found.double(), expected.double()
    error = ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


@dataclass(frozen=True)
class Times:
    """Samples of one piece of work: on the device's clock, and of the host until all was issued."""

    device_ms: Sequence[float]
    host_ms: Sequence[float]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.device_ms)

    @property
    def host_median_ms(self) -> float:
        return statistics.median(self.host_ms)


def alternate(works: Sequence[Callable[[], object]], rounds: int, warm_ups: int = 2) -> list[Times]:
    """The times of each work, the sides alternating round by round."""
    for _ in range(warm_ups):
        for work in works:
            work()
    samples: list[list[tuple[float, float]]] = [[] for _ in works]
    for _ in range(rounds):
        for work, found in zip(works, samples, strict=True):
            found.append(_one(work))
    return [Times([device for device, _ in found], [host for _, host in found]) for found in samples]


def _one(work: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds on the device and of the host. On the CPU both are the same."""
    if not torch.cuda.is_available():
        start_s = time.perf_counter()
        work()
        elapsed_ms = 1e3 * (time.perf_counter() - start_s)
        return elapsed_ms, elapsed_ms
    torch.cuda.synchronize()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_s = time.perf_counter()
    first.record()
    work()
    last.record()
    host_ms = 1e3 * (time.perf_counter() - start_s)
    torch.cuda.synchronize()
    return first.elapsed_time(last), host_ms
