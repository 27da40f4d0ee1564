"""Takes routed tokens to their experts and back: all that ties a layer to the ranks that share its experts.

1. Plan: sort the N = T*K row copies by (destination rank, local expert), exchange counts in one small all-to-all, one
   device-to-host sync for the sizes; none with a capacity (`dispatch_plan.py`).
2. Permute the rows into send order (`kernels/permute.py`).
3. Run the schedule: send and receive rows, compute experts, send results back, overlapped (`executor.py`). A shared
   expert computes beside the near rows, under the far ones' transfers.
4. Unpermute and weight the results.

It knows no gate: whatever says which experts a token visits can use it, the package's router as well as the gates of
layers that DeepSpeed made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ds_moe_ep.comm.callbacks import TransferCallback, with_callbacks
from ds_moe_ep.comm.lanes import Lanes, make_lanes
from ds_moe_ep.comm.recorder import Both, Off, Recorder
from ds_moe_ep.comm.transport import Loopback, Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.kernels.permute import permute, unpermute
from ds_moe_ep.moe.agreement import Agreement, Call, Mode, announce_bad_input
from ds_moe_ep.moe.dispatch_plan import DispatchPlan, make_plan
from ds_moe_ep.moe.executor import PassContext, run_experts
from ds_moe_ep.moe.experts import LocalExperts, SharedExpert
from ds_moe_ep.moe.layout import lay_out
from ds_moe_ep.moe.router import Routes, use_triton
from ds_moe_ep.moe.tuner import AutotuneRun, Choice, Drift
from ds_moe_ep.schedule.build import Schedule, backward_schedule, forward_schedule


@dataclass(frozen=True)
class Connection:
    """What ties a layer to its group: the transport, and the schedules over the group's torus.

    The controls are the same pieces at depth 0.
    """

    transport: Transport
    forward: Schedule
    backward: Schedule
    control_forward: Schedule
    control_backward: Schedule

    @classmethod
    def of(cls, config: MoEConfig, transport: Transport, torus: Torus) -> Connection:
        configs = (config, replace(config, depth=0))
        schedules = [make(c, torus) for c in configs for make in (forward_schedule, backward_schedule)]
        return cls(transport, *schedules)

    @cached_property
    def text(self) -> str:
        """The schedules as text: equal on two ranks where the schedules are."""
        return f"{self.forward} {self.backward}"


class Dispatcher:
    """The dispatcher of one layer. With ep_size > 1 it needs `connect` before its first call."""

    def __init__(self, config: MoEConfig, name: str = "") -> None:
        self.config = config
        self.name = name  # in the record and in errors
        self.connection = Connection.of(config, Loopback(), Torus(1, 1)) if config.ep_size == 1 else None
        self.lanes: Lanes | None = None
        self.recorder: Recorder = Off()
        self.clock: Recorder = Off()  # a second one, of whoever times the layer besides
        self.blocking = False  # runs the control: the same pieces, nothing hidden, the same results bit for bit
        self.choice: Choice | None = None  # of the schedule 'auto'
        self.drift = Drift(config.retune_drift)
        self._device: torch.device | None = None
        self._num_calls = 0
        self._history = 0  # a digest of the backward passes so far
        self._bare: Transport | None = None  # the transport without the callbacks
        self._callbacks: list[TransferCallback] = []
        self._num_copies = 0

    def __deepcopy__(self, memo: object) -> Dispatcher:
        """A dispatcher of its own over the same links: communicators, and who watches them, are the process's."""
        self._num_copies += 1  # its name tells ranks that are in another copy
        twin = Dispatcher(self.config, f"copy {self._num_copies} of {self.name or 'a layer'}")
        twin.choice, twin._callbacks = self.choice, list(self._callbacks)
        if self._bare is not None:
            twin.connect(self._bare, self.torus)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process can use: all but the links."""
        return Dispatcher, (self.config, self.name), {"choice": self.choice, "_callbacks": self._callbacks}

    def configure(self, config: MoEConfig) -> None:
        """Takes other knobs than it was made with. Local; the number of experts and ep_size stay."""
        own = self.config
        assert (config.num_experts, config.ep_size) == (own.num_experts, own.ep_size), "these shape parameters"
        self.config, self.choice = config, None
        self.drift = Drift(config.retune_drift)
        self._reconnect()

    @property
    def torus(self) -> Torus:
        """Where the ranks of the layer's group stand; one rank before it is connected."""
        return Torus(1, 1) if self.connection is None else self.connection.forward.torus

    @property
    def bare_transport(self) -> Transport | None:
        """What it was connected with: the links' transport without the callbacks."""
        return self._bare

    def connect(self, transport: Transport, torus: Torus | None = None) -> None:
        """Takes its links. Local. `torus` places the group's ranks on nodes; by default all share one.

        Raises ConfigError when the group's size is not ep_size.
        """
        if transport.size != self.config.ep_size:
            raise ConfigError(
                f"moe_ep.ep_size={self.config.ep_size}, but the layer is connected to a group of {transport.size} "
                "ranks: pass the group of ep_size ranks that share its experts"
            )
        self._bare = transport
        transport = with_callbacks(transport, self._callbacks)
        self.connection = Connection.of(self._resolved_config(), transport, torus or Torus(1, transport.size))

    def add_callback(self, callback: TransferCallback) -> None:
        """Puts a callback around each message of the layer, behind those that are there. Between passes.

        Local, but every rank of the group adds the same ones in the same order.
        """
        self._take_callbacks([*self._callbacks, callback])

    def remove_callback(self, callback: TransferCallback) -> None:
        """Takes a callback away. Between passes, and on every rank of the group."""
        self._take_callbacks([each for each in self._callbacks if each is not callback])

    def _take_callbacks(self, callbacks: list[TransferCallback]) -> None:
        self._callbacks = callbacks
        if self._bare is not None:
            self.connect(self._bare, self.torus)

    def take_choice(self, choice: Choice) -> None:
        """Runs the schedule of a choice where the configuration says 'auto'. Local; every rank takes the same one."""
        self.choice = choice
        self._reconnect()

    def _reconnect(self) -> None:
        if self.connection is not None:
            self.connection = Connection.of(
                self._resolved_config(), self.connection.transport, self.connection.forward.torus
            )

    def _resolved_config(self) -> MoEConfig:
        """The configuration with the schedule that 'auto' stands for; serial until one is chosen."""
        if self.config.schedule != "auto":
            return self.config
        return replace(self.config, **(self.choice.knobs if self.choice else {"schedule": "serial"}))

    def checked_connection(self) -> Connection:
        """The links. Raises EngineError before `connect`."""
        if self.connection is None:
            raise EngineError(
                f"moe_ep.ep_size={self.config.ep_size}: the layer has no expert-parallel group yet (a pickled one "
                "comes back without); pass the model to deepspeed.initialize or ds_moe_ep.initialize, or call the "
                "layer's set_deepspeed_parallelism(), or its connect(transport) where there is no DeepSpeed"
            )
        return self.connection

    @contextmanager
    def announcing(self, device: torch.device, training: bool) -> Iterator[None]:
        """A scope before the exchange of counts: a failure is told to the peers, who wait there.

        With a capacity on CUDA there is no exchange: the peers wait for rows until the group's time limit.
        """
        try:
            yield
        except BaseException:
            self._num_calls += 1  # as the peers, for whom this call has begun
            if device.type == "cpu" or self.config.capacity(1, training) is None:
                with suppress(EngineError):  # the first failure is the one to tell
                    transport, call = self.checked_connection().transport, Call(self.name)
                    announce_bad_input(transport, self.config.num_local_experts, device, call)
            raise

    def __call__(
        self,
        x_TD: Tensor,
        routes: Routes,
        experts: LocalExperts,
        training: bool,
        shared: SharedExpert | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The weighted results [T, D] with the shared expert's outputs added, or beside them where types differ.

        Collective over the expert group, forward and backward: every rank of the group calls it equally often.
        """
        connection, in_triton = self.checked_connection(), use_triton(self.config, x_TD.device)
        row_type = (x_TD.shape[1], x_TD.dtype)
        sees_drift = self.drift.is_beyond_bound()
        call = Call(self.name, self._num_calls, connection.text, Mode.of(training), self._history)
        self._num_calls += 1
        needs = needs_gradient(x_TD, routes, experts, shared)
        num_experts, transport = self.config.num_experts, connection.transport
        plan = make_plan(routes, num_experts, transport, row_type, sees_drift, call, needs, in_triton)
        try:
            rows_ND, weights_TK, context = self._prepare(x_TD, routes, plan, experts, training, shared)
            if plan.goes_backward and not needs:  # a peer's pass backward needs this rank's
                rows_ND.requires_grad_()
        except BaseException as error:  # the peers are about to send rows, and to wait for some
            connection.transport.abandon(error, call.tags)
            raise
        context = replace(context, begin_backward=partial(self._begin_backward, call, row_type, x_TD.is_cuda))
        results_ND, shared_TD = run_experts(rows_ND, experts, context, shared)
        added = [shared_TD] if shared is not None and shared_TD.dtype == results_ND.dtype else []
        y_TD = unpermute(results_ND, weights_TK, plan.maps, added, in_triton)
        return y_TD, None if added or shared is None else shared_TD

    def _begin_backward(self, call: Call, row_type: tuple[int, torch.dtype], is_cuda: bool) -> None:
        """Makes sure that the group's ranks all begin the backward pass of a call; on CUDA the next call does."""
        transport = self.checked_connection().transport
        if transport.size > 1 and not is_cuda:
            now = replace(call, mode=Mode.BACKWARD, history=self._history)
            Agreement(transport, now, self.config.num_experts, row_type).on_backward()
        self._history = crc32(str(call.number).encode(), self._history)

    def _prepare(
        self,
        x_TD: Tensor,
        routes: Routes,
        plan: DispatchPlan,
        experts: LocalExperts,
        training: bool,
        shared: SharedExpert | None,
    ) -> tuple[Tensor, Tensor, PassContext]:
        """The rows [N, D] in send order, the weights [T, K] of their results, and their way."""
        connection = self.checked_connection()
        if self.lanes is None or self._device != x_TD.device:
            self.lanes, self._device = make_lanes(x_TD.device, connection.transport.size), x_TD.device
        rows_ND, weights_TK = permute(x_TD, plan.maps, use_triton(self.config, x_TD.device)), routes.weights_TK
        if routes.weighs_rows:
            weight_of_row_N1 = weights_TK.flatten()[plan.maps.choice_of_row_N].unsqueeze(1)
            rows_ND, weights_TK = (rows_ND * weight_of_row_N1).to(x_TD.dtype), torch.ones_like(weights_TK)
        is_tuned = self.config.schedule == "auto" and connection.transport.size > 1
        if is_tuned and training and not torch.is_inference_mode_enabled():
            connection = self._tune(rows_ND, plan, experts, shared, self.lanes)
        num_shared = 0 if shared is None else len(x_TD)
        layout = lay_out(
            plan, connection.forward.pieces, connection.forward.torus, connection.transport.rank, num_shared
        )
        forward, backward = (
            (connection.control_forward, connection.control_backward)
            if self.blocking
            else (connection.forward, connection.backward)
        )
        recorder = Both.of(self.recorder, self.clock) if training else Off()
        return (
            rows_ND,
            weights_TK,
            PassContext(layout, forward, backward, connection.transport, self.lanes, recorder, self.name),
        )

    def _tune(
        self, rows_ND: Tensor, plan: DispatchPlan, experts: LocalExperts, shared: SharedExpert | None, lanes: Lanes
    ) -> Connection:
        """The links to use now: measured anew where there is no choice yet, or where some rank sees drift."""
        assert self.connection is not None
        self.drift.see(plan.num_received)
        if self.choice is None or plan.is_drift_seen:
            if shared is not None:
                shared = replace(shared, x_TD=shared.x_TD.detach())
            transport = self.connection.transport
            trial = AutotuneRun(self.config, rows_ND.detach(), plan, experts, transport, self.torus, lanes, shared)
            self.take_choice(trial.choose())
            self.drift.restart()
        return self.connection


def needs_gradient(x_TD: Tensor, routes: Routes, experts: LocalExperts, shared: SharedExpert | None) -> bool:
    """Whether something of this rank's needs the backward pass through the experts."""
    if not torch.is_grad_enabled():
        return False
    parameters = [*experts.expert_parameters(), *(() if shared is None else shared.experts.expert_parameters())]
    is_weighed = routes.weighs_rows and routes.weights_TK.requires_grad
    return x_TD.requires_grad or is_weighed or any(parameter.requires_grad for parameter in parameters)
