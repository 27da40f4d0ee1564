"""`MoE`: DeepSpeed's MoE layer with this package's insides.

DeepSpeed's engine recognises the layer by its class, its attributes and its state-dict keys. The class is inherited,
nothing of its constructor or forward pass is. Expert parameters carry DeepSpeed's marks (`allreduce`, `group_name`);
its engine then averages their gradients over the expert-data-parallel group and divides by the whole data-parallel
world, which is the gradient of the global batch's mean for every ep_size: the layer itself scales nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

from ds_moe_ep.comm.open import transport_over
from ds_moe_ep.comm.transport import Loopback
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import RankGrid, even_share, torus_of
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.arguments import config_of_arguments, refuse_beside_config
from ds_moe_ep.engine.checkpoint.model_files import refuse_part_of_experts
from ds_moe_ep.engine.checkpoint.own_experts import take_own_experts
from ds_moe_ep.engine.face import LayerFace
from ds_moe_ep.engine.layouts import tensor
from ds_moe_ep.engine.layouts.stages import hosts_of
from ds_moe_ep.engine.own_layers import meet
from ds_moe_ep.engine.parallelism import problem_of_parallelism
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.moe.balance import BatchLoad, BiasBalance
from ds_moe_ep.moe.dispatcher import Dispatcher
from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks
from ds_moe_ep.moe.tuner import Choice

SHAPING = ("num_experts", "ep_size", "gate_bias")  # knobs that shape parameters and cannot change after a layer is made

HAS_BIAS = "has_bias"  # of MoEConfig


class MoE(DeepSpeedMoE):
    """An expert-parallel layer in place of `deepspeed.moe.layer.MoE`.

    The arguments up to `top2_2nd_expert_sampling` are DeepSpeed's, with its defaults and its meaning; any k is
    allowed, and RSample and used_token, which DeepSpeed's layer has for top-1, work for each. `config` says all of
    them (but use_residual), and more, at once. `shared` is an expert that every token visits; `use_residual` mixes the
    output with that of a dense copy of `expert` (arXiv 2201.05596).

    forward(hidden_states [..., D], used_token [...] or None) returns (output [..., D], l_aux [], exp_counts [E]).
    Collective over the expert-parallel group. The groups are made by deepspeed.initialize (or
    `set_deepspeed_parallelism`). copy.deepcopy shares them, and all ranks call an EMA copy alike; a pickled layer needs
    `set_deepspeed_parallelism` again. Raises ConfigError for arguments that cannot work or have no meaning here.
    """

    adds_residual = True  # its forward takes `residual`

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        config: MoEConfig | None = None,
        shared: nn.Module | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        nn.Module.__init__(self)
        if config is None:
            config = config_of_arguments(given)
        else:
            refuse_beside_config(given)
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = False
        self.ep_size = config.ep_size
        self.num_experts = config.num_experts
        self.num_local_experts = config.num_local_experts
        self.decided: Mapping[str, Any] = {}  # knobs that weights of a folder were trained with
        self.expert_group_name = f"ep_size_{config.ep_size}"
        self.deepspeed_moe = LayerFace(hidden_size, expert, config, shared)
        self.mark_experts()
        if self.num_local_experts < self.num_experts:
            self.register_state_dict_pre_hook(refuse_part_of_experts)
            self.register_load_state_dict_pre_hook(take_own_experts)
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Makes a copy of what copy.deepcopy or pickle kept; torch leaves attributes of parameters out of copies."""
        super().__setstate__(state)
        self.mark_experts()

    @property
    def kind(self) -> str:
        """The origin of the layer, as hooked layers have theirs."""
        return "ds_moe_ep.MoE"

    @property
    def config(self) -> MoEConfig:
        """The layer's knobs as they are in force."""
        return self.deepspeed_moe.config

    @property
    def choice(self) -> Choice | None:
        """The schedule that 'auto' chose, the same on every rank; None before the first pass of training."""
        return self.dispatcher.choice

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher that moves the layer's rows."""
        return self.deepspeed_moe.dispatcher

    @property
    def tensor_ranks(self) -> TensorRanks:
        """The ranks of the dense part's tensor parallelism, who share the layer's tokens; by default one."""
        return self.deepspeed_moe.tensor_ranks

    @property
    def balance(self) -> BiasBalance | None:
        """The balancing bias; None where the layer has none."""
        return self.deepspeed_moe.gate.balance

    @property
    def batch_load(self) -> BatchLoad:
        """The load of the batch so far, for balance_scope "batch"."""
        return self.deepspeed_moe.gate.batch_load

    @property
    def last_counts_E(self) -> Tensor:
        """This rank's choices per expert in the last forward pass."""
        return self.deepspeed_moe.last_counts_E

    def mark_experts(self) -> list[str]:
        """Puts DeepSpeed's marks on the experts' parameters; returns the names of those that had none.

        Parameters that came later (adapters) would be averaged over ranks that hold other experts. Local. Call it
        before parameters are sorted into groups for an optimizer; `set_deepspeed_parallelism` does so too.
        """
        found = []
        for name, parameter in self.deepspeed_moe.experts.named_parameters():
            if not seams.is_expert_parameter(parameter):
                found.append(name)
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
        return found

    def configure(self, config: MoEConfig, path: str = "moe_ep") -> None:
        """Gives the layer other knobs. Local; before the groups are made.

        Raises ConfigError where a knob that shapes parameters differs from the one that the layer was made with, or one
        that routes from the one that the model's folder was trained with.
        """
        for name, value in self.decided.items():
            found = getattr(config, name)
            if name == HAS_BIAS and found != value:
                raise ConfigError(
                    f"{path}.balance={config.balance!r}: the router of the model's folder chooses with a bias; write "
                    "'bias', whose bias_step of 0 leaves it as it is, or 'bias_and_aux_loss'"
                )
            if found != value:
                raise ConfigError(
                    f"{path}.{name}={found!r}: config.json of the model's folder decides it ({value!r}); leave it out"
                )
        for name in SHAPING:
            ours, theirs = getattr(self.config, name), getattr(config, name)
            if ours != theirs:
                raise ConfigError(
                    f"{path}.{name}={theirs}: the layer was made with {name}={ours}, which shapes its parameters; "
                    f"make the layer with {name}={theirs} or change the section"
                )
        self.deepspeed_moe.configure(config)

    def fingerprint(self) -> str:
        """A hash of the knobs and the parameters' names, shapes and types."""
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in self.named_parameters()]
        text = f"{self.config.fingerprint()} {self.use_residual} {shapes}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Makes the expert-parallel groups, or finds them, and connects the layer. DeepSpeed's engine calls it.

        Its section "moe_ep" reaches its layers first. Collective over the world; of a pipeline's stages each comes once
        for every layer of its own. Raises EngineError on every rank where ranks differ in configuration or model,
        ConfigError where the section cannot work, and TopologyError where ep_size does not fit the world.
        """
        if not dist.is_initialized():
            raise EngineError(
                f"moe_ep.ep_size={self.ep_size}: torch.distributed is not initialized, so no expert-parallel group "
                "can be made; call deepspeed.init_distributed() first"
            )
        seams.init_distributed()  # torch's is up, and DeepSpeed's may not be
        engine = seams.engine_being_made()
        if problem := problem_of_parallelism(engine):
            raise EngineError(problem)
        if engine is not None:
            meet(engine, moe_layers(engine.module))
        self._find_batch()
        self.mark_experts()
        self.share_tokens()
        num_stages = seams.num_pipeline_stages()
        if num_stages > 1:
            hosts = hosts_of(engine)
        else:
            hosts = seams.compare_ranks("moe_ep and the MoE layer", self.fingerprint())
        grid = RankGrid(
            world_size=len(hosts),
            ep_size=self.ep_size,
            data_before_expert=use_data_before_expert_parallel_,
            num_stages=num_stages,
        )
        group, ranks = seams.expert_group(self.ep_size, use_data_before_expert_parallel_)
        tensor.refuse_mixed_groups(self.tensor_ranks, group, self.config)
        if self.ep_size == 1:
            self.deepspeed_moe.connect(Loopback())
            return
        needs = bool(self.config.replicas), self.config.two_level != "off"
        lanes = seams.lanes_beside(group, grid.ep_groups(), self.config.timeout_s, *needs)
        if lanes.ranks != tuple(ranks):
            raise EngineError(
                f"moe_ep.ep_size={self.ep_size}: DeepSpeed's expert-parallel group holds ranks {ranks}, the layer's "
                f"lanes {list(lanes.ranks)}; give every MoE layer the same use_data_before_expert_parallelism"
            )
        node_size = self.config.node_size or even_share(hosts)
        self.deepspeed_moe.connect(transport_over(lanes, self.config), torus_of(ranks, node_size))

    def _find_batch(self) -> None:
        """Says which ranks share the batch, where a loss asks. Local. Raises ConfigError where none can know."""
        scope = self.config.balance_scope
        if not self.config.has_aux_loss or scope not in ("sequence", "batch"):
            return
        if scope == "sequence" and (size := seams.sequence_parallel_size()) > 1:
            raise ConfigError(
                f"moe_ep.balance_scope='sequence' with sequence parallel size={size}: each rank routes a part of a "
                "sequence, and knows no load of the whole; set it to 'rank', 'group' or 'batch'"
            )
        if scope == "sequence":
            return
        self.batch_load.sum_over_ranks = seams.sum_over_tokens

    def share_tokens(self) -> None:
        """Shares the layer's tokens with the tensor ranks that DeepSpeed was given. Collective over them.

        Raises EngineError on every rank where the experts or the gate are cut over them.
        """
        ranks = tensor.tensor_ranks_of(self, self.config)
        self.deepspeed_moe.share_tokens(ranks)
        self.deepspeed_moe.hidden_size = self.deepspeed_moe.gate.width  # AutoTP divides it with a shared expert it cuts
        if ranks.is_shared:
            tensor.take_whole(self)
        tensor.mark_as_apart(self.deepspeed_moe.experts)
        for module in (self.deepspeed_moe.gate, *([self.mlp, self.coefficient] if self.use_residual else [])):
            tensor.make_alike(ranks, module)

    def forward(
        self, hidden_states: Tensor, used_token: Tensor | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(output, l_aux, exp_counts), as DeepSpeed's layer returns them; collective over the expert group.

        `residual` is added to the output.
        """
        added = None if self.use_residual else residual
        output, l_aux, exp_counts = self.deepspeed_moe(hidden_states, used_token, added)
        if self.use_residual:
            dense = self.tensor_ranks.beside(self.mlp, hidden_states)
            dense = dense[0] if isinstance(dense, tuple) else dense  # as DeepSpeed: a second output is left out
            share = F.softmax(self.tensor_ranks.beside(self.coefficient, hidden_states), dim=-1)
            output = output * share[..., 0:1] + dense * share[..., 1:]
            output = output if residual is None else output + residual
        return output, l_aux, exp_counts


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The package's MoE layers in a model, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def connect_layers(model: nn.Module) -> None:
    """Connects the package's layers that are not yet; DeepSpeed's inference engine asks for it. Collective."""
    for layer in moe_layers(model).values():
        if layer.dispatcher.connection is None:
            layer.set_deepspeed_parallelism()


seams.at_init_inference(connect_layers)
