"""`verify`: two steps of an engine beside a dense model, and its verdicts; the engine is what it was afterwards.

1. Every rank keeps the engine's whole state in host memory, and looks at the optimizer's groups.
2. Two steps are taken. Between the backward pass and the step, routes, balance losses and gradients are compared with
   the dense oracle's; after the step, what moved, the norm that clipped, the loss scale, and the replicas.
3. A checkpoint is saved, read by expert, and loaded over spoilt weights.
4. The state is put back, also where anything failed, and all ranks' verdicts are gathered.

Each part ends with an exchange in which every rank says whether it failed, so that none goes on alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.explain_errors import Supervision
from ds_moe_ep.engine.extensions.engine_extensions import EngineExtensions
from ds_moe_ep.engine.layouts.expert_files import ExpertFiles, problem_of_files
from ds_moe_ep.engine.state.engine_state import EngineState, untold
from ds_moe_ep.engine.state.optimizer_view import AppliedNorm, own_square, sum_over_world, whole_weights
from ds_moe_ep.engine.views.layers import ViewedLayer, viewed_layers
from ds_moe_ep.engine.views.observe import Observation, ObservedPass
from ds_moe_ep.errors import EngineError
from ds_moe_ep.health.watch import Watch
from ds_moe_ep.verification import judge_optimizer
from ds_moe_ep.verification.gate_oracle import model_balance
from ds_moe_ep.verification.judge_balance import BiasMovement, balance_weights
from ds_moe_ep.verification.judge_checkpoint import OUTPUT, CheckpointJudge
from ds_moe_ep.verification.judge_optimizer import Movement
from ds_moe_ep.verification.judge_passes import ExpertsOutcome, PassJudge, ask_oracle, judge_gradients
from ds_moe_ep.verification.judge_source import source_problems
from ds_moe_ep.verification.oracle import OracleLayer
from ds_moe_ep.verification.steps import LastBatch, around_steps, taker_of
from ds_moe_ep.verification.tensor_shares import whole_passes
from ds_moe_ep.verification.verdicts import CHECKS, EngineReport, TrainingVerdict, concluded

NUM_STEPS = 2
EXPERT = " expert "  # in the name of a tensor of one
DEFAULT_LIMIT_S = 600.0  # of layers that have no time limit of their own
IN_MEMORY = ("none", "cpu")  # devices of offloaded states
MAX_SKIPPED = 40  # steps that an overflow may skip: the loss scale halves with every second one
TOLD = {
    "groups": "every parameter of experts and gates lies in one group, with the config's step size",
    "routing": "tokens went where the scores say, with their weights",
    "balance": "balance losses and biases are what the load says",
    "gradients": "outputs and gradients are the dense model's, layer by layer, within rounding",
    "movement": "every expert that rows reached moved, and no other",
    "norm": "the norm that clips counts every expert once",
    "loss scale": "all ranks have one loss scale",
    "replicas": "copies of one expert, and of all else, are equal on all ranks",
    "checkpoint": "saved, read by expert and loaded: equal outputs, weights and optimizer states",
}
NO_COPIES = "ZeRO-3 has each number on one rank: there are no copies that could differ"
TOLD_OF_PARTITIONS = "saved and loaded: equal outputs, partitions of weights, and optimizer states"


def verify(
    engine: Any,
    batch: Any,
    *,
    loss_of: Callable[[Any], Tensor] | None = None,
    checkpoint: bool = True,
    folder: str | None = None,
    source: torch.nn.Module | None = None,
) -> EngineReport:
    """The verdicts on an engine that trains MoE layers, after two steps that are undone bit for bit.

    `batch` is a micro-batch of this rank as the model takes it (a tensor, a tuple or list of arguments, a mapping of
    keywords), or an iterator of such ones; in a pipeline as `train_batch` takes them, and None on stages that read
    none. `loss_of` takes the loss out of the model's output: by default the output
    itself, its `loss`, or its first tensor. With `checkpoint` a checkpoint is saved in a fresh folder below `folder`,
    which all ranks must see, loaded and removed. `source` is the model that AutoEP converted, with its weights;
    without it the routing of each block is compared with one of the same class and configuration.

    Collective over the world, between two steps; every rank gets the same report. Needs host memory for the whole
    training state. Raises EngineError on every rank for an engine that it cannot verify, and the error of the first
    rank whose step failed.
    """
    check_engine(engine)
    take_step = taker_of(engine, batch, loss_of)
    verification = Verification(engine, checkpoint=checkpoint, folder=folder, source=source)
    with verification, verification.among_others():
        while not verification.is_over:
            take_step()
        return verification.report()


def check_engine(engine: Any) -> None:
    """Raises EngineError, on every rank, for an engine that cannot be verified. Collective over the world."""
    seams.settle(_problem_of(engine))
    if not any(seams.gather(len(viewed_layers(engine.module)))):  # a stage may have none
        raise EngineError(f"verify: model={type(engine.module).__name__} has no MoE layer: there is nothing to verify")


class Verification:
    """Verification of an engine whose steps somebody takes. As a context manager it puts the engine's state back.

    Collective over the world, from its making to its end.
    """

    def __init__(
        self,
        engine: Any,
        *,
        checkpoint: bool = True,
        folder: str | None = None,
        source: torch.nn.Module | None = None,
        when_over: Callable[[EngineReport], None] | None = None,
    ) -> None:
        self._when_over = when_over  # called with the report where the steps are somebody else's
        self._engine, self._checkpoint, self._folder, self._source = engine, checkpoint, folder, source
        self._layers = viewed_layers(engine.module)
        self._observation = Observation(self._layers)
        self._found: list[TrainingVerdict] = []
        self._told = dict(TOLD)
        if engine.zero_optimization_partition_weights():
            self._told |= {"replicas": NO_COPIES, "checkpoint": TOLD_OF_PARTITIONS}
        self._scopes = ExitStack()
        self._num_steps, self._num_skipped = 0, 0
        self._has_compared = False  # a layer with the dense model
        self._batch = LastBatch(engine)

    @property
    def is_over(self) -> bool:
        """True when all steps were taken."""
        return self._num_steps >= NUM_STEPS or self._num_skipped >= MAX_SKIPPED

    def __enter__(self) -> Verification:
        engine = self._engine
        state = EngineState(engine)
        self._scopes.callback(state.put_back)
        self._scopes.enter_context(untold(engine))
        self._scopes.enter_context(_supervised(engine, self._layers))
        self._scopes.enter_context(self._observation.watching())
        self._scopes.enter_context(around_steps(engine, self._judged_step, self._end_where_over))
        self._scopes.enter_context(self._batch.watching())
        self._part("groups", lambda: judge_optimizer.groups(engine, self._layers))
        self._part("movement", lambda: judge_optimizer.frozen(self._layers))
        with self._whole_layers():
            self._part("routing", lambda: source_problems(engine.module, self._layers, self._source))
        return self

    @contextmanager
    def among_others(self) -> Iterator[None]:
        """A scope in which all ranks need each other: an error of one is told to the others, who do not wait for it."""
        watch = _watch_of(self._layers)
        try:
            with watch.among_others("verify"):
                yield
        except Exception as error:
            watch.report(error, "verify")
            raise

    def __exit__(self, *error: object) -> None:
        self._scopes.close()

    def report(self) -> EngineReport:
        """All ranks' verdicts, after the steps and the checkpoint. Collective."""
        engine = self._engine
        if self._num_steps < NUM_STEPS:
            told = f"{self._num_skipped} steps in a row were skipped for an overflow"
            fix = "find what is not finite: the log of ds_moe_ep.initialize names ranks and parameters"
            self._found.append(TrainingVerdict("run", "problem", told, fix))
        if reason := self._no_checkpoint():
            self._found.append(TrainingVerdict("checkpoint", "note", f"none was saved: {reason}"))
            self._told.pop("checkpoint", None)
        else:
            judge = CheckpointJudge(engine, self._layers, self._batch)
            self._part("checkpoint", lambda: judge.problems(self._folder))
        if not any(seams.gather(self._has_compared)):
            self._told.pop("gradients", None)
        everyone = seams.gather(self._found)
        verdicts = dict.fromkeys(verdict for theirs in everyone for verdict in theirs)
        return EngineReport(tuple(_ordered(list(verdicts), self._told)))

    def _no_checkpoint(self) -> str:
        """Why no checkpoint is judged, or an empty string. Collective."""
        if not self._checkpoint:
            return "it was not asked for"
        stored = (each for layer in self._layers for each in layer.stored_parameters().values())
        if self._engine.zero_optimization_partition_weights() and not all(each.requires_grad for each in stored):
            return "DeepSpeed saves no frozen experts under ZeRO-3; it does with zero_optimization.stage=2"
        if not EngineExtensions.of(self._engine).has(ExpertFiles):
            return ""
        refusals = seams.gather(problem_of_files({layer.ep_size for layer in self._layers}))
        return next((str(each) for each in refusals if each is not None), "")

    def _part(self, check: str, judge: Callable[[], Iterable[TrainingVerdict]]) -> None:
        """Runs one check on all ranks; an error of one rank is a problem that all of them know of. Collective."""
        error: Exception | None = None
        try:
            for verdict in judge():  # those before an error count
                self._found.append(verdict)
        except Exception as caught:
            error = caught
        told = None if error is None else f"{type(error).__name__}: {error}"
        failed = [(rank, theirs) for rank, theirs in enumerate(seams.gather(told)) if theirs is not None]
        if failed:
            rank, words = failed[0]
            fix = "see the error; the checks behind it were not made"
            self._found.append(TrainingVerdict(check, "problem", f"the check failed: {words}", fix, "", rank))

    def _end_where_over(self) -> None:
        if self.is_over and self._when_over is not None:
            self._when_over(self.report())

    def _judged_step(self, step: Callable[[], Any]) -> Any:
        if self.is_over:
            return step()
        engine, taken = self._engine, self._observation.take()
        passes = {layer.name: whole_passes(layer, taken[layer.name]) for layer in self._layers}
        if not self._are_finite(passes):
            result = step()
            self._num_skipped += 1
            return result
        outcomes: dict[str, ExpertsOutcome] = {}
        with self._whole_layers():
            self._part("routing", lambda: self._local(passes, PassJudge.routing))
            self._part("balance", lambda: self._local(passes, PassJudge.balance))
            self._part("balance", lambda: balance_weights(engine, self._layers, passes, self._told))
            self._part("gradients", lambda: self._gradients(passes, outcomes))
        square = own_square(engine)
        movement, bias = Movement(engine, self._layers), BiasMovement(engine, self._layers, passes)
        applied = AppliedNorm(engine)
        with applied.watching():
            result = step()
        if not engine.was_step_applied():
            self._num_skipped += 1
            return result
        self._num_steps += 1
        self._part("movement", lambda: movement.problems(outcomes))
        self._part("balance", bias.problems)
        self._part("norm", lambda: judge_optimizer.norm(engine, square, applied))
        self._part("loss scale", lambda: judge_optimizer.scales(engine))
        self._part("replicas", lambda: judge_optimizer.replicas(engine, self._layers))
        return result

    def _whole_layers(self) -> AbstractContextManager[None]:
        return whole_weights(each for layer in self._layers for each in layer.layer.parameters())

    def _local(
        self, passes: Mapping[str, Sequence[ObservedPass]], judge: Callable[[PassJudge], Iterator[TrainingVerdict]]
    ) -> Iterator[TrainingVerdict]:
        for layer in self._layers:
            yield from judge(PassJudge(self._engine, layer, passes[layer.name]))

    def _gradients(
        self, passes: Mapping[str, Sequence[ObservedPass]], outcomes: dict[str, ExpertsOutcome]
    ) -> Iterator[TrainingVerdict]:
        outcomes.update({layer.name: ExpertsOutcome({}, {}) for layer in self._layers})
        balance = model_balance(self._engine, self._layers, passes, self._batch.kwargs)
        stage, most = seams.pipeline_stage(), max(seams.gather(len(self._layers)))
        for layer in (*self._layers, *[None] * (most - len(self._layers))):  # stages may have more than others
            oracle, trouble = (OracleLayer(), "") if layer is None else ask_oracle(layer, passes[layer.name])
            told = [words for theirs, words in seams.gather((stage, trouble)) if words and theirs == stage]
            if layer is None:
                continue
            if told:
                yield TrainingVerdict("gradients", "note", told[0], "", layer.name)
                continue
            self._has_compared = True
            theirs = None if balance is None else balance.get(layer.name, [])
            problems, outcomes[layer.name] = judge_gradients(layer, passes[layer.name], oracle, theirs)
            yield from problems

    def _are_finite(self, passes: Mapping[str, Sequence[ObservedPass]]) -> bool:
        """True where all gradients that came back to layers are finite, on every rank. Collective."""
        gradients = [seen.dy_TD for theirs in passes.values() for seen in theirs]
        bad = any(gradient is not None and not gradient.isfinite().all() for gradient in gradients)
        return not float(sum_over_world(torch.tensor([float(bad)], device=self._engine.device)))


@contextmanager
def _supervised(engine: Any, layers: Sequence[ViewedLayer]) -> Iterator[None]:
    """A scope in which the watch over all ranks ends what a rank's error would leave waiting."""
    extensions = EngineExtensions.of(engine)
    if extensions.has(Supervision):
        yield
        return
    callback = Supervision(engine, _watch_of(layers))
    extensions.install([callback])
    try:
        yield
    finally:
        extensions.uninstall([callback])


def _watch_of(layers: Sequence[ViewedLayer]) -> Watch:
    """The watch over all ranks, with the shortest time limit of the layers that have one."""
    limits = [layer.layer.config.timeout_s for layer in layers if hasattr(layer.layer, "config")]
    return seams.watch_of_world(min(limits, default=DEFAULT_LIMIT_S))


def _problem_of(engine: Any) -> EngineError | None:
    """Why an engine cannot be verified, or None. Local."""
    reason = ""
    if engine.optimizer is None:
        reason = "engine has no optimizer: verification takes steps; pass the engine that trains"
    elif engine.zero_offload_param() is not None and engine.zero_offload_param().device != "none":
        reason = "zero_optimization.offload_param: weights elsewhere cannot be put back; verify with them in memory"
    elif engine.zero_offload_optimizer() is not None and engine.zero_offload_optimizer().device not in IN_MEMORY:
        reason = "zero_optimization.offload_optimizer: states on a disk cannot be put back; take device=cpu"
    elif seams.has_mesh() and seams.sequence_parallel_size() > 1:
        reason = "sequence_parallel_size: the weights of a mesh's sequence ranks part; give DeepSpeed parallel_state_sp"
    elif not seams.has("sparse routes"):
        reason = f"DeepSpeed {seams.release()} gives no sparse routes: pip install 'deepspeed>=0.19.7'"
    elif engine.micro_steps % engine.gradient_accumulation_steps():
        reason = "engine.micro_steps: a batch has begun; call verify after engine.step has stepped"
    return EngineError(f"verify: {reason}") if reason else None


def _ordered(verdicts: Sequence[TrainingVerdict], told: Mapping[str, str]) -> Iterator[TrainingVerdict]:
    """The verdicts check by check; of a problem that several ranks have, the first rank's."""
    for check in CHECKS:
        first: dict[tuple[str, str], TrainingVerdict] = {}
        for verdict in verdicts:
            if verdict.check == check:
                first.setdefault((verdict.parameter, verdict.fix), verdict)
        problems = [verdict for verdict in first.values() if verdict.status == "problem"]
        if check == "gradients":  # a wrong output makes wrong gradients of experts, and not the other way round
            problems.sort(key=lambda verdict: EXPERT in verdict.parameter)
        if check == "checkpoint":  # another weight makes other outputs, of which a model may give many
            problems.sort(key=lambda verdict: verdict.parameter.startswith(OUTPUT))
        if problems or check in told:
            yield from concluded(check, problems, told.get(check, ""))
        notes = {(v.found, v.parameter): replace(v, rank=None) for v in first.values() if v.status == "note"}
        yield from notes.values()
