"""Verdicts on what keeps experts evenly loaded, beyond one rank's passes: the loss's weight, and the bias's steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.views.layers import ViewedLayer
from ds_moe_ep.engine.views.observe import ObservedPass
from ds_moe_ep.verification.judge_passes import PassJudge
from ds_moe_ep.verification.verdicts import TrainingVerdict, problem, short

WEIGHT_ROUNDING = 1e-2  # a weight that went through bf16
BIAS_ROUNDING = 0.1  # of a step: a bias in fp32 is some thousand steps at most


def balance_weights(
    engine: Any, layers: Sequence[ViewedLayer], passes: Mapping[str, Sequence[ObservedPass]], told: dict[str, str]
) -> Iterator[TrainingVerdict]:
    """Problems of the weights with which layers' balance losses stand in the loss. Collective over the world.

    Puts the weight into the words for the check where all is well.
    """
    own = {layer.name: PassJudge(engine, layer, passes[layer.name]).balance_weights() for layer in layers}
    everyone = seams.gather(own)
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):  # of all stages
        first = next((weight for theirs in everyone for weight in theirs.get(name, ())), None)
        if first is None:
            continue
        told["balance"] = f"the balance loss reaches the gate, with a weight of {short(first)} in the loss"
        odd = [each for each in own.get(name, ()) if abs(each - first) > WEIGHT_ROUNDING * max(abs(first), 1e-12)]
        if odd:
            yield problem(
                "balance",
                f"its balance loss has a weight of {short(odd[0])} in a micro-batch of this rank, and of "
                f"{short(first)} in the first one",
                "every micro-batch and rank must add l_aux with the same weight; engine.backward divides by "
                "gradient_accumulation_steps itself",
                name,
            )


class BiasMovement:
    """The balancing bias before a step, and the load that moves it. Its making is collective."""

    def __init__(
        self, engine: Any, layers: Sequence[ViewedLayer], passes: Mapping[str, Sequence[ObservedPass]]
    ) -> None:
        self._asked: list[tuple[ViewedLayer, Tensor]] = []
        for layer in layers:
            before_E = layer.bias_in_steps()
            if before_E is None:
                continue
            own_E = torch.zeros(layer.num_experts, dtype=torch.int64)
            for seen in passes[layer.name]:
                assert seen.ids_TK is not None
                own_E += torch.bincount(seen.ids_TK.flatten(), minlength=layer.num_experts)
            load_E = seams.sum_over_batch(engine, own_E.to(engine.device)).cpu()
            step_E = torch.sign(load_E.sum() - load_E * len(load_E))
            if not any(seen.has_mask for seen in passes[layer.name]):
                self._asked.append((layer, before_E + step_E))

    def problems(self) -> Iterator[TrainingVerdict]:
        """Problems of a bias that did not follow the load. Local."""
        for layer, asked_E in self._asked:
            found_E = layer.bias_in_steps()
            assert found_E is not None, "it had one before the step"
            wrong_E = (found_E - asked_E).abs() > BIAS_ROUNDING
            if wrong_E.any():
                expert = int(wrong_E.nonzero()[0])
                yield problem(
                    "balance",
                    f"the balancing bias of expert {expert} stands at {short(float(found_E[expert]))} steps after the "
                    f"step, and the load says {short(float(asked_E[expert]))}",
                    "let an engine of deepspeed.initialize or ds_moe_ep.initialize step; in a loop of your own call "
                    "layer.gate.balance.step after each step",
                    layer.name,
                )
