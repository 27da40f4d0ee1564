"""The package's layer and its gate as DeepSpeed's engine and its users find them: by class, and by what they read.

`engine.moe_layers` and `engine.gate_modules` list modules of the classes MOELayer and TopKGate, and programs read
attributes of both. Each has its true value here; one that would have none is an AttributeError that says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch import Tensor

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.arguments import NOISE
from ds_moe_ep.engine.extensions.clock import LayerClock, Timed
from ds_moe_ep.engine.hooks.layer import copied
from ds_moe_ep.kernels.eager import not_compiled
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.router import Router
from ds_moe_ep.moe.routes import Routing

POLICIES = {noise: policy for policy, noise in NOISE.items() if policy != "None"}

# What programs read of a TopKGate.
GATE: dict[str, Callable[[MoEConfig], Any]] = {
    "k": lambda config: config.top_k,
    "capacity_factor": lambda config: config.capacity_factor,
    "eval_capacity_factor": lambda config: config.eval_capacity_factor,
    "min_capacity": lambda config: config.min_capacity,
    "noisy_gate_policy": lambda config: POLICIES[config.noise],
    "use_rts": lambda config: config.drop_policy == "random",
    "top2_2nd_expert_sampling": lambda config: config.sample_second,
}
FACTORS = ("capacity_factor", "eval_capacity_factor")


class Gate(Router, TopKGate):
    """The router in place of a `TopKGate`. Its knobs are read here, and changed by the layer's `configure`."""

    clock: LayerClock

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__(hidden_size, config)
        self.wall_clock_breakdown = False
        self.clock = LayerClock()

    def forward(self, x_TD: Tensor, used_token_T: Tensor | None = None) -> Routing:
        with self.clock.scope("gate"):
            return super().forward(x_TD, used_token_T)

    @property
    def drop_tokens(self) -> bool:
        """True where experts have a capacity, in the mode that the gate is in."""
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        return factor is not None

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        """DeepSpeed's expert-parallel group; None before it is made."""
        return seams.known_expert_group(self.config.ep_size)

    @property
    def gate_time(self) -> float:
        """Milliseconds, as `clock.py` has them."""
        return self.clock.part_ms("gate")

    def __getattr__(self, name: str) -> Any:
        if name not in GATE:
            return super().__getattr__(name)
        value = GATE[name](self.config)
        if value is None and name in FACTORS:
            raise AttributeError(f"gate.{name}: no token is dropped in that mode, and experts have no capacity there")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (*GATE, "drop_tokens"):
            raise AttributeError(f"gate.{name}: the gate has its knobs of the layer; change them with MoE.configure")
        super().__setattr__(name, value)


class LayerFace(Timed, ExpertParallel, MOELayer):
    """The layer in place of a `MOELayer`."""

    gate: Gate
    router_class = Gate
    use_tutel = False
    __deepcopy__ = copied

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.wall_clock_breakdown = False
        self.ep_size, self.num_local_experts = self.config.ep_size, self.config.num_local_experts
        self.ep_group_name = f"ep_size_{self.ep_size}"

    @not_compiled
    def forward(
        self, x: Tensor, used_token: Tensor | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        clock = self.gate.clock
        clock.begin(self._device, is_on=self.wall_clock_breakdown and self.training)
        self.dispatcher.time_with(clock.lanes)
        with clock.scope("moe"):
            output, self.l_aux, self.exp_counts = super().forward(x, used_token, residual)
        return output, self.l_aux, self.exp_counts

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        """DeepSpeed's expert-parallel group; None before it is made."""
        return seams.known_expert_group(self.ep_size)

    def layer_clock(self) -> LayerClock:
        return self.gate.clock
