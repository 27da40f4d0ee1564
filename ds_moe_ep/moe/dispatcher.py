"""Takes routed tokens to their experts and back: all that ties a layer to the ranks that share its experts.

1. Plan: sort the N = T*K row copies by (destination rank, local expert), exchange counts, with
   one device-to-host sync for the sizes; none with a capacity (`dispatch_plan.py`).
2. Permute the rows into send order (`kernels/permute.py`).
3. Run the schedule: send and receive rows, compute experts, send results back, overlapped (`executor.py`). A shared
   expert computes beside the near rows, under the far ones' transfers.
4. Unpermute and weight the results.

It knows no gate: whatever says which experts tokens visit can use it, the package's router as well as the gates of
layers that DeepSpeed made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ds_moe_ep.comm.callbacks import TransferCallback, with_callbacks
from ds_moe_ep.comm.lanes import Lanes, make_lanes, refuse_capture
from ds_moe_ep.comm.open import link_of_replicas
from ds_moe_ep.comm.recorder import Both, Off, Recorder
from ds_moe_ep.comm.transport import Loopback, Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.kernels.permute import RowMaps, permute, unpermute
from ds_moe_ep.moe.agreement import Agreement, Call, Mode, announce_bad_input
from ds_moe_ep.moe.dispatch_plan import DispatchPlan, PendingPlan, begin_plan
from ds_moe_ep.moe.executor import PassContext, run_experts
from ds_moe_ep.moe.experts import LocalExperts, SharedExpert, needs_gradient
from ds_moe_ep.moe.grouped.choice import grouped_experts
from ds_moe_ep.moe.layout import LastLayout
from ds_moe_ep.moe.replicas.hosted import HostedPass
from ds_moe_ep.moe.replicas.replicas import Replicas, Window
from ds_moe_ep.moe.router import sent_weights, use_triton
from ds_moe_ep.moe.routes import Routes
from ds_moe_ep.moe.tensor_parallel.early import EarlyGather
from ds_moe_ep.moe.tuner import AutotuneRun, Choice
from ds_moe_ep.moe.tuning.retuning import Retuning
from ds_moe_ep.moe.two_level.connection import Connection, may_copy
from ds_moe_ep.moe.two_level.plan import begin_two_level, num_told

Observer = Callable[[Routes, DispatchPlan], None]


class Dispatcher:
    """The dispatcher of one layer. With ep_size > 1 it needs `connect` before its first call.

    Whoever uses it reads its state and changes it by its methods: each change that schedules follow from makes the
    connection anew, and between passes alone.
    """

    def __init__(self, config: MoEConfig, name: str = "") -> None:
        self._config = config
        self._name = name
        self._connection = Connection.of(config, Loopback(), Torus(1, 1)) if config.ep_size == 1 else None
        self._lanes: Lanes | None = None
        self._device: torch.device | None = None  # of the lanes
        self._recorder: Recorder = Off()
        self._clock: Recorder = Off()
        self._observer: Observer | None = None
        self._is_blocking = False
        self._choice: Choice | None = None
        self._retuning = Retuning(config.retune_drift)
        self._num_calls = 0
        self._history = 0  # a digest of the backward passes so far
        self._layout = LastLayout()
        self._bare: Transport | None = None  # the transport without the callbacks
        self._callbacks: list[TransferCallback] = []
        self._num_copies = 0
        self._replicas: Replicas | None = None
        self._window: Window | None = None

    def __deepcopy__(self, memo: object) -> Dispatcher:
        """A dispatcher of its own over the same transport: communicators, and who watches them, are the process's."""
        self._num_copies += 1  # its name tells ranks that are in another copy
        twin = Dispatcher(self._config, f"copy {self._num_copies} of {self._name or 'a layer'}")
        twin._choice, twin._callbacks = self._choice, list(self._callbacks)
        if self._bare is not None:
            twin.connect(self._bare, self.torus)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """All that another process can use: not the connection."""
        return Dispatcher, (self._config, self._name), {"_choice": self._choice, "_callbacks": self._callbacks}

    @property
    def config(self) -> MoEConfig:
        """The knobs in force."""
        return self._config

    @property
    def name(self) -> str:
        """The layer's name in records and errors."""
        return self._name

    @property
    def connection(self) -> Connection | None:
        """The connection; None before `connect`."""
        return self._connection

    @property
    def choice(self) -> Choice | None:
        """The schedule that "auto" stands for; None before the first pass of training."""
        return self._choice

    @property
    def retuning(self) -> Retuning:
        """The drift since its schedule was measured."""
        return self._retuning

    @property
    def recorder(self) -> Recorder:
        """The recorder of the passes of training."""
        return self._recorder

    @property
    def is_blocking(self) -> bool:
        """True while passes run the control."""
        return self._is_blocking

    @property
    def replicas(self) -> Replicas | None:
        """The slots for copies of other ranks' experts; None without any."""
        return self._replicas

    def follow(self, window: Window | None) -> None:
        """Lets copies of experts serve an engine's windows; None: one pass each. Local, between windows."""
        self._window = window
        if self._replicas is not None:
            self._replicas.window = window

    @property
    def torus(self) -> Torus:
        """The torus on which the ranks of the layer's group stand; one rank before it is connected."""
        return Torus(1, 1) if self._connection is None else self._connection.forward.torus

    @property
    def bare_transport(self) -> Transport | None:
        """The transport that it was connected with, without the callbacks."""
        return self._bare

    def rename(self, name: str) -> None:
        """Takes the name that records and errors show. Local, but the same on every rank of the group."""
        self._name = name

    def record(self, recorder: Recorder, *, is_blocking: bool = False) -> None:
        """Records the passes of training from now on; `Off()` ends it. Local, between passes.

        With `is_blocking` they run the control: the same pieces with nothing hidden, and the same results bit for bit.
        """
        self._recorder, self._is_blocking = recorder, is_blocking

    def time_with(self, clock: Recorder) -> None:
        """Takes a second recorder, of whoever times the layer besides."""
        self._clock = clock

    def observe(self, observer: Observer | None) -> None:
        """Hands routes and plan of each pass of training to an observer; None ends it. Local, between passes."""
        self._observer = observer

    def configure(self, config: MoEConfig) -> None:
        """Takes other knobs than it was made with. Local; the number of experts and ep_size stay."""
        own = self._config
        assert (config.num_experts, config.ep_size) == (own.num_experts, own.ep_size), "these shape parameters"
        self._config = config
        self._retuning = Retuning(config.retune_drift, self._retuning.alike)
        self.forget_choice()

    def connect(self, transport: Transport, torus: Torus | None = None) -> None:
        """Takes its connection. Local. `torus` places the group's ranks on nodes; by default all share one.

        Raises ConfigError when the group's size is not ep_size.
        """
        if transport.size != self._config.ep_size:
            raise ConfigError(
                f"moe_ep.ep_size={self._config.ep_size}, but the layer is connected to a group of {transport.size} "
                "ranks: pass the group of ep_size ranks that share its experts"
            )
        if not self._config.replicas or transport.size == 1:
            self._replicas = None
        elif self._replicas is None or self._bare is not transport:
            link, places = link_of_replicas(transport, self._config.replicas), torus or Torus(1, transport.size)
            self._replicas = Replicas(self._config, link, places)
            self._replicas.window = self._window
        self._bare = transport
        transport = with_callbacks(transport, self._callbacks)
        self._connection = self._connect(transport, torus or Torus(1, transport.size))

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
        self._choice = choice
        self._reconnect()

    def forget_choice(self) -> None:
        """Lets the next pass of training choose again. Local; every rank forgets its choice in the same place."""
        self._choice = None
        self._reconnect()

    def _reconnect(self) -> None:
        if self._connection is not None:
            self._connection = self._connect(self._connection.transport, self.torus)

    def _connect(self, transport: Transport, torus: Torus) -> Connection:
        """The connection with the schedule that 'auto' stands for; serial until one is chosen."""
        config = self._config
        if config.schedule == "auto":
            knobs = dict(self._choice.knobs if self._choice else {"schedule": "serial"})
            if not may_copy(config, transport, torus):  # a choice of another run, or from before a callback
                knobs.pop("two_level", None)
            config = replace(config, **knobs)
        elif config.two_level == "auto":
            config = replace(config, two_level="off")
        return Connection.of(config, transport, torus)

    def checked_connection(self) -> Connection:
        """The connection. Raises EngineError before `connect`."""
        if self._connection is None:
            raise EngineError(
                f"moe_ep.ep_size={self._config.ep_size}: the layer has no expert-parallel group yet (a pickled one "
                "comes back without); pass the model to deepspeed.initialize or ds_moe_ep.initialize, or call the "
                "layer's set_deepspeed_parallelism(), or its connect(transport) where there is no DeepSpeed"
            )
        return self._connection

    @contextmanager
    def announcing(self, device: torch.device, training: bool, shares_tokens: bool = False) -> Iterator[None]:
        """A scope before the exchange of counts: a failure is told to the peers, who wait there.

        With a capacity on CUDA there is no exchange, but for tokens that tensor ranks share: the peers wait for rows
        until the group's time limit.
        """
        refuse_capture(device)
        try:
            yield
        except BaseException:
            self._num_calls += 1  # as the peers, for whom this call has begun
            num_nodes = 0 if self._connection is None else self._connection.num_nodes
            has_counts = device.type == "cpu" or num_nodes or shares_tokens
            if has_counts or self._config.capacity(1, training) is None:
                with suppress(EngineError):  # the first failure is the one to tell
                    transport, call = self.checked_connection().transport, Call(self._name)
                    num_counts = self._replicas.num_told if self._replicas else self._config.num_local_experts
                    num_counts = num_told(self._config.num_experts, num_nodes) if num_nodes else num_counts
                    announce_bad_input(transport, num_counts, device, call)
            raise

    def __call__(
        self,
        x_TD: Tensor,
        routes: Routes,
        experts: LocalExperts,
        training: bool,
        shared: SharedExpert | None = None,
        residual_TD: Tensor | None = None,
        early: EarlyGather | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The weighted results [T, D] with the shared expert's outputs and the residual added.

        Beside them is what is left to add: those of the two whose type is another one. Collective over the expert
        group, forward and backward: every rank of the group calls it equally often.
        """
        config, connection, in_triton = self._config, self.checked_connection(), use_triton(self._config, x_TD.device)
        transport, row_type, sees_drift = connection.transport, (x_TD.shape[1], x_TD.dtype), self._retuning.is_due()
        call = Call(self._name, self._num_calls, connection.text, Mode.of(training), self._history)
        self._num_calls += 1
        two_level = None if routes.weighs_rows and config.two_level == "auto" else connection.two_level
        needs = needs_gradient(x_TD, routes, experts, shared, two_level is not None and two_level.with_sums)
        hosted: HostedPass | None = None
        agreement = Agreement(transport, call, config.num_experts, row_type, sees_drift, needs)
        if two_level is not None:
            pending = begin_two_level(routes, agreement, two_level, in_triton)
        elif self._replicas is None:
            pending = begin_plan(routes, config.num_experts, transport, row_type, sees_drift, call, needs, in_triton)
        else:
            hosted = HostedPass(self._replicas, self._replicas.begin(routes, agreement, experts, training, in_triton))
            pending = PendingPlan(None, hosted.finish)
        made = None if early is None else early.own_gradient
        permuted = partial(permute, x_TD, use_triton=in_triton, weights_TK=sent_weights(routes), made=made)
        early_ND = self._permute_early(permuted, pending, call)
        plan = pending.finish()
        if training and self._observer is not None:
            self._observer(routes, plan)
        try:
            experts = experts if hosted is None else hosted.experts()
            rows_ND = permuted(plan.maps) if early_ND is None else early_ND
            if training:
                self._tune(rows_ND, plan, experts, shared)
            # From here on: what was tuned may run another schedule than the one that this call was announced with.
            context = self._context(rows_ND, plan, experts, call, shared)
            weights_TK = torch.ones_like(routes.weights_TK) if routes.weighs_rows else routes.weights_TK
            early = early and early.arm(context, plan.maps, weights_TK, rows_ND, are_plain=not routes.weighs_rows)
            if plan.goes_backward and not needs:  # a peer's pass backward needs this rank's
                rows_ND.requires_grad_()
            if plan.goes_backward and hosted is not None:
                rows_ND, experts = hosted.lend(rows_ND)
        except BaseException as error:  # the peers are about to send rows, and to wait for some
            transport.abandon(error, call.tags)
            raise
        weights_UK = None
        if plan.copies is not None and (sums := plan.copies.sums) is not None:
            weights_UK, weights_TK = sums.weights_of_copies(weights_TK), sums.result_weights(weights_TK)
        results_ND, shared_TD = run_experts(rows_ND, experts, context, shared, weights_UK, early)
        to_add = [each for each in (shared_TD, residual_TD) if each is not None]
        added = [each for each in to_add if each.dtype == results_ND.dtype]
        y_TD = unpermute(results_ND, weights_TK, plan.maps, added, in_triton, None if early is None else early.own)
        return y_TD, [each for each in to_add if each.dtype != results_ND.dtype]

    def _permute_early(self, permuted: Callable[[RowMaps], Tensor], pending: PendingPlan, call: Call) -> Tensor | None:
        """The rows [N, D] in send order, launched before the host waits for the counts, where they need none."""
        try:
            return None if pending.maps is None else permuted(pending.maps)
        except BaseException as error:  # the peers have the counts, and are about to send rows
            self.checked_connection().transport.abandon(error, call.tags)
            raise

    def _begin_backward(self, call: Call, row_type: tuple[int, torch.dtype], is_cuda: bool) -> None:
        """Makes sure that the group's ranks all begin the backward pass of a call; on CUDA the next call does."""
        transport = self.checked_connection().transport
        if transport.size > 1 and not is_cuda:
            now = replace(call, mode=Mode.BACKWARD, history=self._history)
            Agreement(transport, now, self._config.num_experts, row_type).on_backward()
        self._history = crc32(str(call.number).encode(), self._history)

    def _lanes_on(self, device: torch.device) -> Lanes:
        """The lanes, made in the first pass: only then is the device known for certain."""
        if self._lanes is None or self._device != device:
            self._lanes, self._device = make_lanes(device, self.checked_connection().transport.size), device
        return self._lanes

    def _tune(self, rows_ND: Tensor, plan: DispatchPlan, experts: LocalExperts, shared: SharedExpert | None) -> None:
        """Measures anew and takes the choice, where "auto" has none yet or some rank sees drift. Collective then."""
        transport = self.checked_connection().transport
        if self._config.schedule != "auto" or transport.size == 1 or torch.is_inference_mode_enabled():
            return
        is_of_rows = self._retuning.rows.is_beyond_bound()
        self._retuning.rows.see(plan.num_received)
        if self._choice is not None and not plan.is_drift_seen:
            return
        shared = None if shared is None else replace(shared, x_TD=shared.x_TD.detach())
        lanes, rows_ND = self._lanes_on(rows_ND.device), rows_ND.detach()
        run = AutotuneRun(self._config, rows_ND, plan, experts, transport, self.torus, lanes, shared, self._name)
        before = self._choice
        self.take_choice(choice := run.choose())
        if self._replicas is not None:
            self._replicas.take_costs(*run.measured[-1], rows_ND, experts)
        self._retuning.measured(self, choice, before, run.agree, is_of_rows)

    def _context(
        self, rows_ND: Tensor, plan: DispatchPlan, experts: LocalExperts, call: Call, shared: SharedExpert | None
    ) -> PassContext:
        """The pass of a plan: where its rows lie, and by which schedules, lanes and transport they move."""
        connection = self.checked_connection()
        transport = connection.transport
        num_shared = 0 if shared is None else shared.x_TD.shape[0]
        begin_backward = partial(self._begin_backward, call, (rows_ND.shape[1], rows_ND.dtype), rows_ND.is_cuda)
        schedules = (connection.forward, connection.backward)
        if self._is_blocking:
            schedules = (connection.control_forward, connection.control_backward)
        group_sizes = grouped_experts(self._config, experts, schedules, rows_ND, plan)
        layout = self._layout.of(plan, connection.forward, transport.rank, num_shared, group_sizes)
        recorder = self._recorder_of(plan, rows_ND.device) if call.mode.is_training else Off()
        lanes, in_triton = self._lanes_on(rows_ND.device), use_triton(self._config, rows_ND.device)
        return PassContext(
            layout, *schedules, transport, lanes, recorder, in_triton, self._name, begin_backward, plan.copies
        )

    def _recorder_of(self, plan: DispatchPlan, device: torch.device) -> Recorder:
        """Whoever records a pass of training: users, the meter, and now and then the tuner."""
        recorder, rank = Both.of(self._recorder, self._clock), self.checked_connection().transport.rank
        if self._choice is None or self._config.schedule != "auto" or self._is_blocking:
            return recorder
        return Both.of(recorder, self._retuning.link.recorder(device, rank, plan))
