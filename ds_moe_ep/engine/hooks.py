"""`attach_overlap`: overlapping send/recv for MoE layers that a model already has.

1. Find the layers: `deepspeed.moe.layer.MoE` and AutoEP's. What cannot be hooked is refused by name, on every rank.
2. Agree: all ranks of an expert group hook the same layers with the same knobs.
3. Open communicators beside DeepSpeed's own expert-parallel groups, shared by all layers of a group.
4. Give each layer its dispatcher, in place (`hooked.py`).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import nn

from ds_moe_ep.comm.callbacks import TransferCallback
from ds_moe_ep.comm.groups import transport_over
from ds_moe_ep.config import MoEConfig
from ds_moe_ep.engine import hooked_native, seams
from ds_moe_ep.engine.company import Company
from ds_moe_ep.engine.hooked import TRAFFIC, HookedLayer, traffic_of
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.errors import ConfigError, EngineError, nearest
from ds_moe_ep.topology import even_share, torus_of


class OverlapHandle:
    """The hooked layers by name, and the way back. As a context manager it removes the hooks at the end."""

    def __init__(self, layers: Mapping[str, HookedLayer], company: Company | None) -> None:
        self.layers = dict(layers)
        self._company = company

    def remove(self) -> None:
        """Makes the model and the engine what they were. Local; between passes. A second call does nothing.

        A wrapper that somebody else put on a method of the engine since then goes with ours.
        """
        for layer in self.layers.values():
            layer.remove()
        if self._company is not None:
            self._company.leave()
        self.layers, self._company = {}, None

    def __enter__(self) -> OverlapHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def add_callback(self, callback: TransferCallback) -> None:
        """Puts a callback around each message of all hooked layers, behind those that are there. Between passes.

        Every rank adds the same ones in the same order.
        """
        for layer in self.layers.values():
            layer.dispatcher.add_callback(callback)

    def remove_callback(self, callback: TransferCallback) -> None:
        """Takes a callback away again. Between passes, on every rank."""
        for layer in self.layers.values():
            layer.dispatcher.remove_callback(callback)

    def __str__(self) -> str:
        lines = [f"{name}: {layer.kind}, {_schedule_of(layer)}" for name, layer in self.layers.items()]
        return "\n".join(lines) or "no layer is hooked"


def _schedule_of(layer: HookedLayer) -> str:
    return str(layer.choice) if layer.choice is not None else f"schedule {layer.config.schedule!r}"


def attach_overlap(
    engine_or_model: nn.Module,
    config: MoEConfig | Mapping[str, Any] | None = None,
    callbacks: Sequence[TransferCallback] = (),
) -> OverlapHandle:
    """Hides the experts' traffic of layers that exist, in place; parameters and checkpoints stay as they are.

    `engine_or_model` is what deepspeed.initialize returned, or a module that holds the layers, whose groups are made.
    An engine gets the company of `ds_moe_ep.initialize` too: the watch, the meter (`meter_every`), safe checkpoints.
    `config` says how rows move (`hooked.TRAFFIC`): a MoEConfig, or a mapping of such knobs. Layers with ep_size 1 have
    no traffic and stay as they are. An expert must map each row by itself, whatever rows stand beside it. `callbacks`
    act on each message that crosses a wire, the same on every rank.

    Collective over the world. Raises EngineError on every rank, with the layers' names, where one cannot be hooked or
    ranks differ, and ConfigError for knobs that are not the hooks' to set.
    """
    if isinstance(engine_or_model, deepspeed.PipelineEngine):
        raise EngineError("engine=PipelineEngine: stages would wait for each other's groups; hook a plain engine")
    is_engine = isinstance(engine_or_model, deepspeed.DeepSpeedEngine)
    model: nn.Module = engine_or_model.module if is_engine else engine_or_model  # type: ignore[assignment]
    if not any(True for _ in candidates(model)):
        raise EngineError(
            f"model={type(model).__name__} has no deepspeed.moe.layer.MoE and no AutoEP layer: hook the model that "
            'deepspeed.initialize returned (AutoEP replaces layers there, where "expert_parallel" is enabled)'
        )
    layers = hook(model, read_traffic(config), callbacks)
    company = None
    if is_engine and layers:
        try:
            company = Company(engine_or_model, layers)
        except BaseException:
            OverlapHandle(layers, None).remove()
            raise
    return OverlapHandle(layers, company)


def read_traffic(config: MoEConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """The knobs of `config` that say how rows move. Raises ConfigError for others in a mapping."""
    if config is None or isinstance(config, MoEConfig):
        return traffic_of(config or MoEConfig())
    for name, value in config.items():
        if name not in TRAFFIC:
            raise ConfigError(
                f"attach_overlap: config.{name}={value!r}: not a knob of the traffic, and the layer's own gate and "
                f"experts say all else; {nearest(name, TRAFFIC)}"
            )
    return traffic_of(MoEConfig.from_dict(config, "attach_overlap: config"))


def hook(
    model: nn.Module, traffic: dict[str, Any], callbacks: Sequence[TransferCallback] = ()
) -> dict[str, HookedLayer]:
    """The layers of the model by name, hooked. Collective over the world; raises as `attach_overlap` does."""
    seams.check_release()
    if not dist.is_initialized():
        raise EngineError("torch.distributed is not initialized: call deepspeed.initialize, then attach_overlap")
    problems: list[str] = []
    hooked: dict[str, HookedLayer] = {}
    for name, layer in candidates(model):
        cls = type_of_hook(layer)
        if layer.ep_size > 1 and (problem := cls.problem_of(layer)):
            problems.append(f"{name or 'the model'} ({type(layer).__name__}) cannot be hooked: {problem}")
        elif layer.ep_size > 1:
            hooked[name] = cls(name, layer, traffic)
    hosts, groups = agree(problems, hooked, [type(callback).__qualname__ for callback in callbacks])
    for layer in hooked.values():
        connect(layer, groups[layer.ep_size], hosts)
    for layer in hooked.values():
        layer.attach()
        for callback in callbacks:
            layer.dispatcher.add_callback(callback)
    names = ", ".join(f"{name} ({layer.kind})" for name, layer in hooked.items())
    seams.say(f"hooked {names}" if hooked else f"no layer of {type(model).__name__} has experts' traffic to hide")
    return hooked


def candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every MoE layer that DeepSpeed made; the package's own overlap already."""
    for name, module in model.named_modules():
        if seams.is_moe_layer(module) and not isinstance(module, MoE):
            yield name, module


def type_of_hook(layer: nn.Module) -> Any:
    """The class that hooks such a layer."""
    if isinstance(layer, DeepSpeedMoE):
        return hooked_native.HookedNative
    try:
        from ds_moe_ep.engine import hooked_autoep  # releases without AutoEP have no such layer
    except ImportError as error:
        tested = ", ".join(seams.TESTED)
        raise EngineError(
            f"deepspeed={deepspeed.__version__}: AutoEP is another one than tested ({error}); install {tested}"
        ) from error
    return hooked_autoep.HookedAutoEP


def agree(
    problems: list[str], hooked: Mapping[str, HookedLayer], callbacks: list[str]
) -> tuple[list[str], dict[int, list[list[int]]]]:
    """The hosts of all ranks, and all expert groups by ep_size, once the ranks agree. Collective over the world."""
    own = [(name, layer.kind, {**vars(layer.config), "callbacks": callbacks}) for name, layer in hooked.items()]
    ranks = {layer.ep_size: dist.get_process_group_ranks(layer.group) for layer in hooked.values()}
    everyone = seams.gather((problems, own, ranks, socket.gethostname()))
    for rank, (theirs, *_) in enumerate(everyone):
        if theirs:
            raise EngineError(f"on rank {rank}: " + "; ".join(theirs))
    odd = [rank for rank, (_, layers, *_) in enumerate(everyone) if layers != everyone[0][1]]
    if odd:
        raise EngineError(
            f"attach_overlap on ranks {odd} hooks other layers, or with other knobs, than on rank 0: every rank must "
            f"have the same model and configuration; rank {odd[0]}: {_names(everyone[odd[0]][1])}; "
            f"rank 0: {_names(everyone[0][1])}"
        )
    groups = {size: sorted({tuple(members[size]) for _, _, members, _ in everyone}) for size in ranks}
    return [host for *_, host in everyone], {size: [list(g) for g in found] for size, found in groups.items()}


def _names(layers: list[tuple[str, str, dict[str, Any]]]) -> str:
    return ", ".join(f"{name} ({kind}, schedule {config['schedule']})" for name, kind, config in layers) or "none"


def connect(layer: HookedLayer, groups: list[list[int]], hosts: list[str]) -> None:
    """Opens or finds the lanes beside the layer's expert group. Collective over the world at first."""
    lanes = seams.lanes_beside(layer.group, groups, layer.config.timeout_s)
    node_size = layer.config.node_size or even_share(hosts)
    layer.dispatcher.connect(transport_over(lanes, layer.config), torus_of(lanes.ranks, node_size))
