"""Router: the experts that a token visits, and with what weight.

1. Logits and scores in fp32 (GShard, arXiv 2006.16668, section 2.2; sigmoid scores: DeepSeek-V3, arXiv 2412.19437).
2. The choice: top-k of the scores, of the best groups where experts have groups (DeepSeek-V3, section 2.1.2), with
   training noise and the balancing bias where configured.
3. The places: with a capacity, who keeps a row of its expert (by position, by score, or drawn).
4. The weights: the chosen scores without noise or bias, renormalised over the kept choices and scaled where configured.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.kernels.choose import runs_triton, why_no_triton
from ds_moe_ep.kernels.eager import without_autocast
from ds_moe_ep.kernels.gate import MAX_EXPERTS, ChoiceNoise, GateRoutes, GateRule, gate_logits, gate_routes
from ds_moe_ep.kernels.sort import count_choices, sort_choices
from ds_moe_ep.moe.balance import BatchLoad, BiasBalance
from ds_moe_ep.moe.match_expert import is_plain, is_plain_linear
from ds_moe_ep.moe.replay.tape import Chosen, Tape
from ds_moe_ep.moe.routes import Routes, Routing

logger = logging.getLogger(__name__)

JITTER = 1e-2  # relative width of the input noise, as DeepSpeed and Switch (arXiv 2101.03961) have it


FAR_BEHIND = torch.iinfo(torch.int64).max  # the place of a choice that takes no part
REPLAYED = 1e30  # more than any logit: the noise on the last expert of a replayed choice
TINY = 1e-9  # the least share of an expert whose bias outweighs its score


class Router(nn.Module):
    """The gate: one matrix [E, D], replicated on every rank.

    The attribute `wg` and the class's place in the layer (`gate`) are the names of DeepSpeed's checkpoints.
    """

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        nn.Module.__init__(self)  # see ExpertParallel
        self.width = hidden_size  # of tokens, also where somebody changes the layer's `hidden_size`
        self.wg = nn.Linear(hidden_size, config.num_experts, bias=config.gate_bias)
        self.balance: BiasBalance | None = None
        self.batch_load = BatchLoad()
        self.tape: Tape | None = None  # records or replays routes
        self.configure(config)

    def configure(self, config: MoEConfig) -> None:
        """Gives the router its knobs; a balancing bias starts at zero where it is new."""
        self.config = config
        if config.force_even:
            say_even()
        if not config.has_bias:
            self.balance = None
        elif self.balance is None:
            self.balance = BiasBalance(config).to(self.wg.weight.device)
        else:
            self.balance.step_size = config.bias_step

    @property
    def draws(self) -> bool:
        """True where a pass may draw numbers, in the mode that the gate is in."""
        config = self.config
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        has_noise = config.sample_second or (self.training and config.noise != "none")
        is_drawn = config.drop_policy == "random" and factor is not None
        return has_noise or is_drawn or not is_plain_linear(self.wg)  # adapted: whatever it computes now

    def forward(self, x_TD: Tensor, used_token_T: Tensor | None = None) -> Routing:
        """The routing of tokens [T, D]; `used_token_T` is nonzero for tokens that take part. Local."""
        config, in_triton = self.config, use_triton(self.config, x_TD.device)
        is_used_T = None if used_token_T is None else used_token_T.reshape(-1) != 0
        capacity = config.capacity(x_TD.shape[0], self.training)
        chosen = None if self.tape is None else self.tape.chosen(x_TD)
        is_counted = chosen is None or chosen.is_whole
        is_whole = is_used_T is None and capacity is None and is_counted  # every choice keeps its weight
        if self._takes_one_pass(x_TD, in_triton):
            rule = GateRule(config.top_k, config.score == "softmax", config.renormalizes and is_whole)
            bias_E = None if self.balance is None or chosen is not None else self.balance.bias_E
            noise = self._choice_noise(x_TD) if chosen is None else noise_that_chooses(chosen, config.num_experts)
            routes = gate_routes(x_TD, self.wg.weight.float(), bias_E, is_used_T, rule, noise)
        else:
            routes, is_whole = self._step_by_step(x_TD, is_used_T, in_triton, chosen), False
        scores_TE, expert_ids_TK = routes.scores_TE, routes.expert_ids_TK
        is_used_TK = None if is_used_T is None else is_used_T.unsqueeze(1).expand_as(expert_ids_TK)
        if chosen is not None and not chosen.is_whole:
            taken_TK = chosen.is_kept_TK if capacity is None else chosen.is_used_TK
            is_used_TK = taken_TK if is_used_TK is None else taken_TK & is_used_TK
        place_TK, is_kept_TK = None, is_used_TK
        if capacity is not None:
            in_queue_TK = is_used_TK
            if chosen is not None and not chosen.is_whole and is_used_TK is not None:
                in_queue_TK = is_used_TK & chosen.is_kept_TK  # what the record dropped takes no place
            priority_TK = self._priority(scores_TE, expert_ids_TK)
            place_TK = places(expert_ids_TK, in_queue_TK, priority_TK, config.num_experts, in_triton)
            is_kept_TK = place_TK < capacity
        counts_KE = routes.counts_KE if is_counted else None
        if counts_KE is None:
            counts_KE = count_choices(expert_ids_TK, is_used_TK, config.num_experts)
        routing = Routing(
            expert_ids_TK=expert_ids_TK,
            weights_TK=self._scaled(
                routes.weights_TK if is_whole else self._weights(routes.weights_TK, is_kept_TK), x_TD.dtype
            ),
            scores_TE=scores_TE,
            logits_TE=routes.logits_TE,
            counts_KE=counts_KE,
            is_used_TK=is_used_TK,
            is_kept_TK=is_kept_TK,
            place_TK=place_TK,
            capacity=capacity,
        )
        if self.tape is not None:
            self.tape.take(routing)
        if self.balance is not None and self.training:
            self.balance.observe(routing.count_E, self.wg.weight)
        return routing

    def _takes_one_pass(self, x_TD: Tensor, in_triton: bool | None) -> bool:
        """True where one kernel may go from tokens to weights: the gate is a plain product in fp32, experts have no
        groups, noise is drawn for one of the choices at most and not for the tokens, and no bias stands beside it.
        """
        if not runs_triton(in_triton, x_TD):
            return False
        config = self.config
        if config.n_group > 1 or config.force_even or config.router_dtype != "fp32":
            return False
        noise = config.noise if self.training else "none"
        num_draws = (noise == "rsample") + config.sample_second
        if noise == "jitter" or num_draws > 1 or (num_draws and self.balance is not None):
            return False
        if config.num_experts > MAX_EXPERTS or not is_plain_linear(self.wg):
            return False
        return runs_triton(in_triton, x_TD, self.wg.weight)

    def _choice_noise(self, x_TD: Tensor) -> ChoiceNoise | None:
        """The noise of a gate that goes in one pass, drawn as its steps would draw it."""
        config = self.config
        is_sampled = self.training and config.noise == "rsample"
        if not (is_sampled or config.sample_second):
            return None
        like_TE = x_TD.new_empty(x_TD.shape[0], config.num_experts, dtype=torch.float32)
        return ChoiceNoise(gumbel_like(like_TE), 0 if is_sampled else 1)

    def _step_by_step(
        self, x_TD: Tensor, is_used_T: Tensor | None, in_triton: bool | None, chosen: Chosen | None
    ) -> GateRoutes:
        """The routes by torch's operations; the weights are the chosen scores as they are."""
        logits_TE, choice_logits_TE = self._logits(x_TD, in_triton)
        scores_TE = self._scores(logits_TE)
        with torch.no_grad():
            if chosen is not None:
                expert_ids_TK = chosen.expert_ids_TK
            elif self.config.force_even:
                expert_ids_TK = in_turn(scores_TE, is_used_T, self.config.top_k)
            else:
                expert_ids_TK = self._choose(choice_logits_TE)
        return GateRoutes(logits_TE, scores_TE, scores_TE.gather(1, expert_ids_TK), expert_ids_TK, None)

    def _scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(1) if self.config.score == "softmax" else logits_TE.sigmoid()

    def _logits(self, x_TD: Tensor, in_triton: bool | None) -> tuple[Tensor, Tensor]:
        """Logits, and the logits with noise that the choice is made from."""
        wide = at_least_fp32(x_TD.dtype)
        noise = self.config.noise if self.training else "none"
        if noise == "jitter":
            x_TD = x_TD.to(wide)
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - JITTER, 1 + JITTER)
        with without_autocast(x_TD.device.type):  # scores stay in fp32 whatever surrounds the layer
            logits_TE = self._product(x_TD, wide, in_triton)
        return logits_TE, logits_TE + gumbel_like(logits_TE) if noise == "rsample" else logits_TE

    def _product(self, x_TD: Tensor, wide: torch.dtype, in_triton: bool | None) -> Tensor:
        """The gate's product, in the type that is configured for it; the result is at least as wide as `wide`."""
        if not (type(self.wg) is nn.Linear and is_plain(self.wg)):  # adapted, hooked or replaced
            logits_TE: Tensor = self.wg(x_TD.to(next(self.wg.parameters()).dtype)).to(wide)
            return logits_TE
        kind = {"fp32": wide, "fp64": torch.float64, "tokens": x_TD.dtype}[self.config.router_dtype]
        bias_E = self.wg.bias
        if kind == wide:
            logits_TE = gate_logits(x_TD, self.wg.weight, in_triton, wide)
            return logits_TE if bias_E is None else logits_TE + bias_E.to(kind)
        weight_ED = self.wg.weight.to(kind)
        logits_TE = nn.functional.linear(x_TD.to(kind), weight_ED, None if bias_E is None else bias_E.to(kind))
        return logits_TE.to(torch.promote_types(kind, wide))

    def _choose(self, logits_TE: Tensor) -> Tensor:
        """Expert ids [T, K], best first. The balancing bias moves the choice and nothing else."""
        config = self.config
        is_outside_TE = None
        if self.balance is not None or config.n_group > 1:
            biased_TE = self._scores(logits_TE)
            if self.balance is not None:
                biased_TE = biased_TE + self.balance.bias_E.to(biased_TE.dtype)
            if config.n_group > 1:
                is_outside_TE = outside_of_groups(biased_TE, config)
            # Their logarithm has the same order, and a Gumbel draw from it is one in proportion to the biased scores.
            logits_TE = biased_TE.clamp(min=TINY).log() if config.sample_second else biased_TE
        if is_outside_TE is not None:
            logits_TE = logits_TE.masked_fill(is_outside_TE, float("-inf"))
        if config.top_k > 2:
            return logits_TE.topk(config.top_k, dim=1).indices
        first_T1 = logits_TE.argmax(1, keepdim=True)
        if config.top_k == 1:
            return first_T1
        if config.sample_second:
            logits_TE = logits_TE + gumbel_like(logits_TE)
        second_T1 = logits_TE.scatter(1, first_T1, float("-inf")).argmax(1, keepdim=True)
        return torch.cat([first_T1, second_T1], 1)

    def _priority(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor | None:
        """The priority by which choices keep a place, best highest; None for first come, first served."""
        if self.config.drop_policy == "score":
            return scores_TE.detach().gather(1, expert_ids_TK)
        if self.config.drop_policy == "random":
            return torch.rand_like(scores_TE[:, :1])
        return None

    def _weights(self, weights_TK: Tensor, is_kept_TK: Tensor | None) -> Tensor:
        if is_kept_TK is not None:
            weights_TK = weights_TK * is_kept_TK
        if self.config.renormalizes:
            smallest = torch.finfo(weights_TK.dtype).eps
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp(min=smallest)
        return weights_TK

    def _scaled(self, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights times their factor, in fp32 or the tokens' wider type, whatever the gate computes in."""
        if self.config.route_scale != 1:
            weights_TK = weights_TK * self.config.route_scale
        wide = at_least_fp32(dtype)
        return weights_TK if weights_TK.dtype == wide else weights_TK.to(wide)


@functools.cache
def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The type, or fp32 where it is narrower."""
    return torch.promote_types(dtype, torch.float32)


def outside_of_groups(scores_TE: Tensor, config: MoEConfig) -> Tensor:
    """True for experts outside of each token's best groups, by the scores that choose (arXiv 2412.19437, 2.1.2)."""
    scores_TGn = scores_TE.unflatten(1, (config.n_group, -1))
    best_TG = scores_TGn.topk(2, dim=2).values.sum(2) if config.group_score == "top2_sum" else scores_TGn.amax(2)
    visited_TM = best_TG.topk(config.topk_group, dim=1).indices
    is_outside_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter_(1, visited_TM, False)
    return is_outside_TG.repeat_interleave(scores_TGn.shape[2], dim=1)


@functools.cache
def say_even() -> None:
    """Tells the log, loudly, that no gate chooses; once in a process."""
    logger.warning(
        "moe_ep.force_even=true: EXPERTS TAKE TOKENS IN TURN, WHATEVER THE GATE SAYS. Times of such a run are those "
        "of an even load; its losses and weights are worth nothing"
    )


def noise_that_chooses(chosen: Chosen, num_experts: int) -> ChoiceNoise:
    """Noise so large that the kernel of one pass chooses these experts, in this order, and weighs them as ever."""
    num_tokens, top_k = chosen.expert_ids_TK.shape
    by_place_TK = REPLAYED * torch.arange(top_k, 0, -1, device=chosen.expert_ids_TK.device, dtype=torch.float32)
    noise_TE = torch.zeros(num_tokens, num_experts, device=chosen.expert_ids_TK.device)
    return ChoiceNoise(noise_TE.scatter_(1, chosen.expert_ids_TK, by_place_TK.expand(num_tokens, top_k)))


def in_turn(scores_TE: Tensor, is_used_T: Tensor | None, top_k: int) -> Tensor:
    """Expert ids [T, K] in turn over the tokens that take part: their numbers differ by one at most."""
    if is_used_T is None:
        place_T = torch.arange(len(scores_TE), device=scores_TE.device)
    else:
        place_T = (is_used_T.long().cumsum(0) - 1).clamp(min=0)
    choices_K = torch.arange(top_k, device=scores_TE.device)
    return (place_T[:, None] * top_k + choices_K) % scores_TE.shape[1]


def places(
    expert_ids_TK: Tensor,
    is_used_TK: Tensor | None,
    priority_TK: Tensor | None,
    num_experts: int,
    in_triton: bool | None = None,
) -> Tensor:
    """The place [T, K] of each choice in its expert's queue; choices that take no part stand far behind.

    Without priorities the queue is GShard's: all first choices in token order, then all second ones. Local, no
    device sync.
    """
    num_tokens, num_choices = expert_ids_TK.shape
    if priority_TK is None:
        in_order = sort_choices(
            expert_ids_TK.t(), None if is_used_TK is None else is_used_TK.t(), num_experts, in_triton
        )
        first_E = in_order.count_E.cumsum(0) - in_order.count_E
        place_TK = in_order.row_of_choice_TK.t() - first_E[expert_ids_TK]
        return place_TK if is_used_TK is None else place_TK.masked_fill(~is_used_TK, FAR_BEHIND)
    ids_M = expert_ids_TK.t().flatten()  # M = K*T, choice-major
    if is_used_TK is not None:
        ids_M = torch.where(is_used_TK.t().flatten(), ids_M, num_experts)
    by_priority_M = priority_TK.t().flatten().argsort(descending=True, stable=True)
    order_M = by_priority_M[ids_M[by_priority_M].argsort(stable=True)]
    count_E = ids_M.new_zeros(num_experts + 1).scatter_add_(0, ids_M, torch.ones_like(ids_M))
    first_E = count_E.cumsum(0) - count_E
    place_M = torch.empty_like(ids_M)
    place_M[order_M] = torch.arange(ids_M.shape[0], device=ids_M.device) - first_E[ids_M[order_M]]
    place_M = torch.where(ids_M == num_experts, FAR_BEHIND, place_M)
    return place_M.view(num_choices, num_tokens).t()


def use_triton(config: MoEConfig, device: torch.device) -> bool | None:
    """The knob `kernels` as operations take it; None lets each choose. Raises ConfigError where Triton cannot run."""
    if config.kernels == "triton" and (reason := why_no_triton(device.type)):
        raise ConfigError(
            f'moe_ep.kernels="triton": {reason}; install it on a machine with CUDA (pip install "ds-moe-ep[triton]"), '
            'or write "auto", which takes plain torch there'
        )
    return None if config.kernels == "auto" else config.kernels == "triton"


def gumbel_like(logits_TE: Tensor) -> Tensor:
    """Standard Gumbel noise: the argmax of logits plus it is a draw from their softmax."""
    return -torch.empty_like(logits_TE).exponential_().log()


def sent_weights(routes: Routes) -> Tensor | None:
    """The weights [T, K] that rows are multiplied by before they are sent; None where results are weighted."""
    return routes.weights_TK if routes.weighs_rows else None
