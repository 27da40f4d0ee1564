"""Ends of an expert's own graph: its rows, its parameters, and no other tensor; and whose hooks lie around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.errors import EngineError


def refuse_foreign(output: Tensor, known: Sequence[Tensor]) -> None:
    """Raises EngineError where the output's graph reaches a tensor that needs a gradient and is none of the known.

    An expert's gradients travel as those of its rows and of its parameters: another tensor's would be lost in silence.
    """
    ends = {node for tensor in known if tensor.requires_grad if (node := gradient_edge(tensor)) is not None}
    for node in _nodes_of(output, ends):
        if (leaf := getattr(node, "variable", None)) is not None:
            raise EngineError(
                f"an expert reads a tensor of shape {tuple(leaf.shape)} that needs a gradient and is no parameter of "
                "it, so that its gradient would be lost: register it on the expert (nn.Parameter), or detach it"
            )


def hooks_around() -> Callable[[Tensor], Any] | None:
    """The packing hook of whoever changes what autograd saves here; None where nobody does.

    A function gets its parameters themselves on the way back where nobody does, and else copies of them. Some
    (Megatron-DeepSpeed's linear layers) add to their gradients by themselves.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: (keep, keep))(True)
    return None if top is None else top[0]


def refuse_lost(output: Tensor, without: Sequence[Tensor]) -> None:
    """Raises EngineError where the output's graph reaches a parameter of these, for which it returned no gradient."""
    edges = {gradient_edge(each): each for each in without}
    for node in _nodes_of(output) if edges else ():
        if (lost := edges.get(node)) is not None:
            raise EngineError(
                f"an expert's function returns no gradient for its parameter of shape {tuple(lost.shape)}; "
                "one that adds it to the parameter's by itself does so to a copy inside of a recomputation or other "
                "hooks on saved tensors: use reentrant checkpoints, or return the gradient"
            )


def _nodes_of(output: Tensor, ends: Iterable[Any] = ()) -> Iterator[Any]:
    """The nodes of the output's graph, each once, without these ends and what lies behind them alone."""
    nodes, seen = [output.grad_fn], set(ends)
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        nodes.extend(next_node for next_node, _ in node.next_functions)


def gradient_edge(tensor: Tensor) -> Any:
    """The node of autograd's graph at which a tensor's gradient arrives."""
    return torch.autograd.graph.get_gradient_edge(tensor).node


@contextmanager
def hooks_off(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Keeps the parameters' hooks for the outer backward pass, which calls them once, with the whole gradient."""
    kept = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in kept:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in kept:
            parameter._backward_hooks = hooks


def keep(tensor: Tensor) -> Tensor:
    """A saved tensor as it is: for graphs of our own, whose tensors a surrounding recomputation must not unpack."""
    return tensor
