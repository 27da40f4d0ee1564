"""One forward and backward pass of the real layer on CudaLanes and a recording device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ds_moe_ep.comm.lanes import CudaLanes
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.moe.dispatcher import Connection
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.schedule.build import Schedule
from tests.comm.recording_device import RecordingDevice, RecordingTransport

TORUS = Torus(2, 2)
Change = Callable[[Schedule], Schedule]


def run_layer(
    device: RecordingDevice,
    change: Change = lambda schedule: schedule,
    experts: int = 8,
    template: type[nn.Module] = GeluMLP,
    has_shared: bool = False,
    make_lanes: type[CudaLanes] = CudaLanes,
    make_transport: type[RecordingTransport] = RecordingTransport,
    torus: Torus = TORUS,
    **knobs: object,
) -> list[str]:
    """The faults of one forward and backward pass on CudaLanes."""
    torch.manual_seed(0)
    config = MoEConfig(num_experts=experts, ep_size=torus.size, top_k=2, **{"schedule": "peers", **knobs})
    layer = ExpertParallel(8, template(8, 16), config, template(8, 16) if has_shared else None)
    layer.connect(make_transport(device, torus.size), torus)
    dispatcher = layer.dispatcher
    links: Connection = dispatcher.checked_connection()
    dispatcher._connection = dataclasses.replace(links, forward=change(links.forward), backward=change(links.backward))
    dispatcher._lanes, dispatcher._device = make_lanes(torch.device("cpu")), torch.device("cpu")
    dispatcher._begin_backward = lambda *call: None  # asks the peers on the host alone; on CUDA the next call does
    x_TD = torch.randn(40, 8, requires_grad=True)
    with device:
        y_TD, loss, _ = layer(x_TD)
        device.forward_waits = len(device.host_waited)
        (y_TD.sum() + loss).backward()
        device.check_freed()
    if device.num_waits != len(device.transfers):
        device.faults.append("a transfer is not waited for")
    return device.faults


def has(faults: Sequence[str], what: str) -> bool:
    return any(what in fault for fault in faults)
