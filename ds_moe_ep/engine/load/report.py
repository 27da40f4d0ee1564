"""Reports of an engine's load: every n steps all ranks gather it, and rank 0 tells it to whoever listens.

DeepSpeed's monitor gets numbers, its TensorBoard a picture, and the folder of `"watch"` a line. Where nobody listens no
layer is observed and nothing is gathered.
"""

from __future__ import annotations

import atexit
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep import __version__
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.extensions.callback import EngineCallback, StepCall
from ds_moe_ep.engine.extensions.overlap_meter import OverlapMeter
from ds_moe_ep.engine.load.gather import GatheredLoad, OwnStep, gather_load
from ds_moe_ep.engine.load.monitor import MAX_EXPERTS, PICTURE, heat_map, load_events
from ds_moe_ep.engine.load.observer import LoadObserver
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.live.lines import LayerShape, RunHead, RunReport
from ds_moe_ep.live.run_log import RunLog, new_run

WATCHED_EVERY = 10  # steps, where neither knob says it


def steps_between_reports(engine: Any, config: MoEConfig) -> int:
    """Steps between two reports; 0 where nobody listens, and in pipeline stages. Alike on all ranks."""
    if seams.num_pipeline_stages() > 1:
        return 0
    if config.watch is not None:
        return config.report_every or WATCHED_EVERY
    return config.report_every or engine.steps_per_print() or 0 if engine.monitor.enabled else 0


def open_run_log(engine: Any, layers: Mapping[str, OverlappedLayer], config: MoEConfig) -> RunLog | None:
    """Rank 0's log in the folder of `"watch"`. Collective over the world where there is one, local where there is none.

    Raises ConfigError on every rank where the folder cannot be written.
    """
    if config.watch is None:
        return None
    hosts_R = tuple(seams.gather(socket.gethostname()))
    log, problem, now_s = None, None, time.time()
    if dist.get_rank() == 0:
        shapes = tuple(
            LayerShape(name=name, num_experts=its.config.num_experts, ep_size=its.ep_size, top_k=its.config.top_k)
            for name, its in layers.items()
        )
        head = RunHead(
            run=new_run(now_s),
            time_s=now_s,
            version=__version__,
            hosts_R=hosts_R,
            layers=shapes,
            every=steps_between_reports(engine, config),
        )
        try:
            log = RunLog(Path(config.watch), head)
        except OSError as error:
            problem = ConfigError(
                f"moe_ep.watch={config.watch!r}: cannot be written by rank 0 ({error.strerror}); name a folder of yours"
            )
    seams.settle(problem)
    return log


def own_guests(layer: OverlappedLayer) -> tuple[int, ...]:
    """The experts in this rank's replica slots, -1 in one that is free; none where a layer has no slots."""
    replicas = getattr(layer.dispatcher, "replicas", None)
    if replicas is None:
        return ()
    guests = replicas.placement.guests_RS[replicas.link.rank]
    present = [-1 if guest is None else int(guest) for guest in guests]
    return (*present, *[-1] * (replicas.num_slots - len(present)))  # "auto" may use fewer slots than there are


class LoadReport(EngineCallback):
    """Observes the layers, and reports every `every` steps. Collective where it reports, with one all-reduce."""

    def __init__(
        self,
        engine: Any,
        layers: Mapping[str, OverlappedLayer],
        every: int,
        log: RunLog | None = None,
        meter: OverlapMeter | None = None,
    ) -> None:
        self._engine, self._every, self._log, self._meter = engine, every, log, meter
        self._observers = {name: LoadObserver(layer) for name, layer in layers.items()}
        for observer in self._observers.values():
            observer.layer.dispatcher.observe(observer)
        self._heat_map_every = next(iter(layers.values())).config.heat_map_every
        self._has_told, self._pictures = False, 0  # drawn, or passed over before this engine went on with a job
        self._loss, self._num_losses = torch.zeros((), device=engine.device), 0
        self._since: tuple[float, int] | None = None  # the clock and the step of the report before
        self._measured: tuple[object, int | None] = (None, None)  # the meter's last measurement, and its step
        if log is not None:
            self._end = partial(_end, log)
            atexit.register(self._end)

    def around_call(self, method: str) -> AbstractContextManager[object]:
        if method == "forward" and self._since is None and self._engine.module.training:
            self._since = (time.perf_counter(), self._engine.global_steps)
        return self.paused() if method == "backward" else nullcontext()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A scope in which passes are recomputations of those that were seen."""
        for observer in self._observers.values():
            observer.is_paused = True
        try:
            yield
        finally:
            for observer in self._observers.values():
                observer.is_paused = False

    def on_backward(self, loss: Any, proceed: Callable[[Any], Any]) -> Any:
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._loss += loss.detach().reshape(()).to(self._loss)
            self._num_losses += 1
        return proceed(loss)

    def after_step(self, step: StepCall) -> None:
        if not (step.is_boundary or step.is_applied):
            return
        last = None if self._meter is None else self._meter.last
        if last is not self._measured[0]:
            self._measured = (last, self._engine.global_steps)
        if self._engine.global_steps % self._every == 0:
            self._report()

    def _report(self) -> None:
        device = self._loss.device
        own = {name: observer.take(device) for name, observer in self._observers.items()}
        guests = {name: own_guests(observer.layer) for name, observer in self._observers.items()}
        spans = [] if self._meter is None else self._meter.spans
        expert_ms = sum(span.stop_us - span.start_us for span in spans if span.lane == "compute") / 1000
        gathered = gather_load(own, OwnStep(self._loss, self._num_losses, expert_ms), guests)
        self._loss, self._num_losses = torch.zeros((), device=device), 0
        now_s, step = time.perf_counter(), self._engine.global_steps
        since_s, since_step = self._since or (now_s, step)
        self._since = (now_s, step)
        if dist.get_rank() == 0:
            self._tell(self._report_of(gathered, now_s - since_s, step - since_step))

    def _report_of(self, gathered: GatheredLoad, passed_s: float, num_steps: int) -> RunReport:
        meter = self._meter
        return RunReport(
            step=self._engine.global_steps,
            time_s=time.time(),
            loss=gathered.loss,
            tokens_per_s=gathered.num_tokens / passed_s if passed_s else None,
            step_ms=1000 * passed_s / num_steps if num_steps else None,
            hidden_step=self._measured[1],
            hidden_percent=None if meter is None else meter.hidden_percent(),
            control_percent=None if meter is None else meter.control_percent(),
            expert_ms_R=gathered.expert_ms_R if any(gathered.expert_ms_R) else (),
            layers=gathered.layers,
        )

    def _tell(self, report: RunReport) -> None:
        """Tells rank 0's listeners. Local."""
        engine = self._engine
        if engine.monitor.enabled:
            num_experts = sum(len(layer.rows_E) for layer in report.layers)
            if num_experts > MAX_EXPERTS and not self._has_told:
                self._has_told = True
                seams.log_rank0(
                    f"the monitor gets no numbers of single experts, of which the layers have {num_experts}, more than "
                    f"{MAX_EXPERTS}; the heat map and the folder of moe_ep.watch have them"
                )
            engine.monitor.write_events(load_events(report, engine.global_samples))
        number = 1 + report.step // self._heat_map_every if self._heat_map_every else 0
        if number > self._pictures:
            self._pictures = number
            seams.write_picture(engine, PICTURE, heat_map(report.layers), engine.global_samples)
        if self._log is not None:
            try:
                self._log.write(report)
            except OSError as error:
                self._log = None
                seams.log_rank0(
                    f"moe_ep.watch={error.filename}: cannot be written ({error.strerror}); the training goes on "
                    "without these lines: make room, and start the run again where they are needed",
                    logging.WARNING,
                )

    def close(self) -> None:
        for observer in self._observers.values():
            observer.layer.dispatcher.observe(None)
        if self._log is not None:
            atexit.unregister(self._end)
            self._end()


def _end(log: RunLog) -> None:
    """Ends a log; whoever reads it misses a line at most."""
    with suppress(OSError):
        log.end()
