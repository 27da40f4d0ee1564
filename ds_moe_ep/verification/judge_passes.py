"""Verdicts on the passes of one step: routing, balance loss, and gradients against the dense oracle.

All of it between the backward pass and the step of a batch's last micro-batch, when weights are those of the passes and
gradients are reduced. Collective over the ranks that have the layer, in the model's order of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.layouts.reductions import batch_group, gradient_divisor, summing_group
from ds_moe_ep.engine.state.optimizer_view import OwnSpan, loss_scale, own_gradient
from ds_moe_ep.engine.views.layers import ViewedLayer
from ds_moe_ep.engine.views.moved import ROUNDINGS, SEED, ExactAndMoved, moved
from ds_moe_ep.engine.views.observe import ObservedPass
from ds_moe_ep.engine.views.parts import RoutingRule
from ds_moe_ep.engine.views.shares import own_shares
from ds_moe_ep.verification.gate_oracle import GateOracle, logits_of
from ds_moe_ep.verification.oracle import Oracle, OracleLayer
from ds_moe_ep.verification.reference_routing import (
    NUM_DRAWS,
    balance_loss,
    counted_ids,
    scores_of,
    strangely_routed,
    weights_of,
)
from ds_moe_ep.verification.tensor_shares import summed_answers, whole_answers
from ds_moe_ep.verification.verdicts import TrainingVerdict, problem, short

EXCHANGE = "compare a run with schedule 'serial' and transport 'collective'; where that is right, report the schedule"


@dataclass(frozen=True)
class PassJudge:
    """The judge of one step's passes of one layer on this rank."""

    engine: Any
    layer: ViewedLayer
    passes: Sequence[ObservedPass]

    @property
    def _gate_type(self) -> torch.dtype:
        """The type in which the gate's logits are computed."""
        return self.layer.gate_type or (self.passes[0].x_TD.dtype if self.passes else torch.float32)

    def _problem(self, check: str, found: str, fix: str) -> TrainingVerdict:
        return problem(check, found, fix, self.layer.name)

    # routing

    def routing(self) -> Iterator[TrainingVerdict]:
        """Problems of the routes. Local."""
        weight_ED, rule = self.layer.weight_ED(), self.layer.rule
        if weight_ED is None or rule.moves_input:
            return
        for seen in self.passes:
            exact, draws = self._logits(seen, weight_ED)
            if not rule.is_drawn and not seen.has_mask:
                strange_T, asked_TE = strangely_routed(seen, exact, draws, rule)
                if len(strange_T):
                    yield self._misrouted(seen, strange_T, asked_TE)
            yield from self._misweighed(seen, exact, draws, rule)

    def _logits(self, seen: ObservedPass, weight_ED: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The logits of a pass, and draws of them within what rounding may do."""
        generator, kind = torch.Generator().manual_seed(SEED), self._gate_type
        x_TD, w_ED = seen.x_TD.double(), weight_ED.detach().cpu().double()
        exact = logits_of(self.layer, x_TD, w_ED)
        near = logits_of(self.layer, moved(x_TD, kind, generator), moved(w_ED, kind, generator))
        reach = ROUNDINGS * (near - exact).abs().amax() + ROUNDINGS * torch.finfo(kind).eps * exact.abs()
        signs = [torch.rand(exact.shape, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(NUM_DRAWS)]
        return exact, [exact + reach * sign for sign in signs]

    def _misrouted(self, seen: ObservedPass, strange_T: Tensor, asked_TE: Tensor) -> TrainingVerdict:
        token = int(strange_T[0])
        assert seen.ids_TK is not None
        went, asked = sorted(seen.ids_TK[token].tolist()), asked_TE[token].nonzero()[:, 0].tolist()
        with_bias = "" if seen.bias_E is None else " and its bias"
        return self._problem(
            "routing",
            f"{len(strange_T)} of {len(seen.ids_TK)} tokens went to other experts than the scores{with_bias} say "
            f"(token {token}: {went} in place of {asked})",
            "check that the bias, the score function and the groups of the gate are those of the checkpoint's model",
        )

    def _misweighed(
        self, seen: ObservedPass, exact: Tensor, draws: Sequence[Tensor], rule: RoutingRule
    ) -> Iterator[TrainingVerdict]:
        assert seen.ids_TK is not None and seen.kept_TK is not None and seen.weights_TK is not None
        asked, *near = (weights_of(scores_of(each, rule), seen.ids_TK, seen.kept_TK, rule) for each in (exact, *draws))
        reach = max((float((each - asked).abs().max()) for each in near if each.numel()), default=0.0)
        reach += torch.finfo(seen.weights_TK.dtype).eps * ROUNDINGS * max(rule.scale, 1.0)
        wrong = (seen.weights_TK.double() - asked).abs()
        if wrong.numel() and float(wrong.max()) > reach:
            token = int(wrong.amax(1).argmax())
            yield self._problem(
                "routing",
                f"routing weights are off by up to {short(float(wrong.max()))} (token {token}: "
                f"{_few(seen.weights_TK[token])} in place of {_few(asked[token])})",
                "check score function, normalisation and scale of the gate against those of the checkpoint's model",
            )

    # balance

    def balance(self) -> Iterator[TrainingVerdict]:
        """Problems of the balance loss that the layer hands out. Local."""
        config, weight_ED, rule = self.layer.balance_config(), self.layer.weight_ED(), self.layer.rule
        if config is None:
            return
        for seen in self.passes:
            can_compute = weight_ED is not None and not rule.moves_input and not seen.has_mask
            if seen.balance_loss is None or not can_compute or config.balance_scope != "rank":
                continue
            assert weight_ED is not None and seen.ids_TK is not None
            exact, draws = self._logits(seen, weight_ED)
            ids_TK = counted_ids(seen, exact, rule)
            asked, *near = (float(balance_loss(each, ids_TK, config, rule)) for each in (exact, *draws))
            reach = max((abs(each - asked) for each in near), default=0.0) + ROUNDINGS * 1e-7 * abs(asked)
            if abs(seen.balance_loss - asked) > reach:
                yield self._problem(
                    "balance",
                    f"the balance loss is {short(seen.balance_loss)}; its formula gives {short(asked)}",
                    "scores must go through the softmax once, and the loss must have its weight once",
                )
                break
        if (
            self.passes
            and (config.has_aux_loss or config.z_loss_weight)
            and any(seen.dbalance is None for seen in self.passes)
        ):
            yield self._problem(
                "balance",
                "the layer's balance loss (l_aux) is no part of the loss: nothing keeps the experts' load even",
                "add l_aux, times your weight, to the loss"
                + (', or set "balance": "none"' if self.layer.kind == "ds_moe_ep.MoE" else ""),
            )

    def balance_weights(self) -> list[float]:
        """The weight of the balance loss in the whole loss, by micro-batch, as one device would see it. Local."""
        factor = self.engine.gradient_accumulation_steps() / loss_scale(self.engine)
        return [seen.dbalance * factor for seen in self.passes if seen.dbalance is not None]


def ask_oracle(layer: ViewedLayer, passes: Sequence[ObservedPass]) -> tuple[OracleLayer, str]:
    """The dense model's answers on this rank's tokens, or why there are none. Collective over the layer's group."""
    if reason := layer.problem_of_oracle():
        return OracleLayer(), f"not compared: {reason}"
    try:
        return Oracle(layer).ask(own_shares(layer.tensor_ranks, passes)), ""
    except Exception as error:  # of whatever module an expert is
        return OracleLayer(), f"the dense model of its experts cannot be computed ({type(error).__name__}: {error})"


def judge_gradients(
    layer: ViewedLayer,
    passes: Sequence[ObservedPass],
    oracle: OracleLayer,
    balance: Sequence[ExactAndMoved] | None,
) -> tuple[list[TrainingVerdict], ExpertsOutcome]:
    """Problems of a layer's outputs and gradients, and what its experts got. Collective over the ranks that have it.

    `balance` has the gradients of the gate's logits from the model's own balance loss; None where nobody knows them.
    """
    problems, outcome = list[TrainingVerdict](), ExpertsOutcome({}, {})
    for local, answers in enumerate(oracle.experts):
        tensors = layer.expert_tensors(local)
        group = summing_group(next(iter(tensors.values())).parameter)
        reduced, outcome.rows[local] = _reduced(layer, answers, oracle.rows_L[local], group)
        for name, stored in tensors.items():
            if stored.parameter.requires_grad:
                found = stored.in_span(own_gradient(stored.parameter))
                outcome.gradient_norms[local, name] = float(found.values.double().norm())
                problems += _compared(layer.expert_name(local, name), found, reduced[name], outcome.rows[local])
    oracle = summed_answers(layer.shares_width_with, whole_answers(layer.tensor_ranks, oracle))
    problems += _token_problems(layer, passes, oracle)
    problems += _gate_problems(layer, passes, oracle, balance)
    return problems, outcome


@dataclass(frozen=True)
class ExpertsOutcome:
    """Outcome of one step for the local experts: rows from all ranks, and norms of this rank's spans of gradients."""

    rows: dict[int, int]
    gradient_norms: dict[tuple[int, str], float]


def _reduced(
    layer: ViewedLayer, values: Mapping[str, ExactAndMoved], num_rows: int, group: dist.ProcessGroup
) -> tuple[dict[str, ExactAndMoved], int]:
    """The mean over the model's copies of what a group's ranks have, and the sum of their rows.

    Collective over the group: one all-reduce.
    """
    parts = [part.flatten() for both in values.values() for part in (both.exact, both.moved)]
    flat = torch.cat([torch.tensor([float(num_rows)], dtype=torch.float64), *parts])
    flat = flat.to(next(layer.layer.parameters()).device)
    dist.all_reduce(flat, group=group)
    rows, *summed = flat.cpu().split([1, *(len(part) for part in parts)])
    means = [part / gradient_divisor() for part in summed]
    found = {
        name: ExactAndMoved(means[2 * index].view_as(both.exact), means[2 * index + 1].view_as(both.exact))
        for index, (name, both) in enumerate(values.items())
    }
    return found, int(rows)


def _compared(name: str, found: OwnSpan, both: ExactAndMoved, num_rows: int) -> Iterator[TrainingVerdict]:
    """A problem where this rank's span of a gradient is not the dense model's. Local."""
    both, values = both.span(found.start, found.values.numel()), found.values
    if not (told := both.differs(values)):
        return
    reached = f"{num_rows} rows reached it" if num_rows else "no row reached it"
    ratio = float(values.double().norm()) / both.size if both.size else 1.0
    times = f", {short(ratio)} times as large" if abs(ratio - 1) > 0.01 else ""
    yield problem(
        "gradients",
        f"its gradient is not the dense model's{times} ({reached}; {told})",
        f"look for hooks on the parameter and for tokens that several ranks share; {EXCHANGE}",
        name,
    )


def _token_problems(
    layer: ViewedLayer, passes: Sequence[ObservedPass], oracle: OracleLayer
) -> Iterator[TrainingVerdict]:
    """Problems of the tokens' outputs and of the routing weights' gradients. Local."""
    for seen, y_TD, dweights_TK in zip(passes, oracle.y_TD, oracle.dweights_TK, strict=True):
        if seen.y_TD is not None and not (layer.adds_more() or seen.has_residual):
            yield from _differing(layer, "output", seen.y_TD, y_TD)
        if seen.dweights_TK is not None:
            yield from _differing(layer, "gradient of the routing weights", seen.dweights_TK, dweights_TK)


def _differing(layer: ViewedLayer, what: str, found: Tensor, asked: ExactAndMoved) -> Iterator[TrainingVerdict]:
    """A problem where a layer's tensor is not the dense model's. Local."""
    if told := asked.differs(found):
        yield problem("gradients", f"the {what} is not the dense model's ({told})", EXCHANGE, layer.name)


def _gate_problems(
    layer: ViewedLayer,
    passes: Sequence[ObservedPass],
    oracle: OracleLayer,
    balance: Sequence[ExactAndMoved] | None,
) -> list[TrainingVerdict]:
    """Problems of the gate's gradient, and of the tokens' that goes through it. Collective over the batch's ranks."""
    weight_ED = layer.weight_ED()
    names = [name for name, parameter in layer.gate_parameters().items() if parameter is weight_ED]
    if weight_ED is None or not names or not weight_ED.requires_grad or layer.rule.moves_input:
        return []
    own_ED = weight_ED.detach().to("cpu", torch.float64)
    total, problems = ExactAndMoved(torch.zeros_like(own_ED), torch.zeros_like(own_ED)), list[TrainingVerdict]()
    for index, (seen, dx_TD, dweights_TK) in enumerate(zip(passes, oracle.dx_TD, oracle.dweights_TK, strict=True)):
        gate = GateOracle(layer, seen, own_ED)
        dgate, through_gate = gate.gradients(dweights_TK)
        total += dgate
        dx_TD += through_gate
        if gate.logits_were_seen and balance is not None:
            problems += _logits_problems(gate, dweights_TK, balance[index] if balance else None)
        if seen.dx_TD is not None and not layer.adds_more():
            problems += _differing(layer, "gradient of its tokens", seen.dx_TD, dx_TD)
    is_masked = any(seen.has_mask for seen in passes)  # then the balance loss is not that of all tokens
    reduced, num_masked = _reduced(layer, {"": total}, int(is_masked), batch_group())
    config = layer.balance_config()
    if num_masked or (config is not None and config.balance_scope != "rank"):
        return []
    found = own_gradient(weight_ED)  # type: ignore[arg-type]
    return [*problems, *_compared(names[0], found, reduced[""], sum(len(seen.x_TD) for seen in passes))]


def _logits_problems(
    gate: GateOracle, dweights_TK: ExactAndMoved, balance: ExactAndMoved | None
) -> Iterator[TrainingVerdict]:
    """Problems of the gradient that came to a gate's logits from routing weights and the model's balance loss."""
    asked, found_TE = gate.logits(dweights_TK), gate.seen_logits()
    if balance is not None:
        asked += balance
    if not (told := asked.differs(found_TE)):
        return
    yield problem(
        "balance",
        f"the gradient of its gate's logits is not that of the routing weights and the model's balance loss ({told})",
        "the model's balance loss must see the gate's logits, which go through its softmax once",
        gate.layer.name,
    )


def _few(values: Tensor) -> str:
    told = [short(float(value)) for value in values[:4]]
    return f"[{', '.join(told)}{'...' if len(values) > 4 else ''}]"
