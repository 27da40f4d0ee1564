"""Code that a trace ran through: a function that changes somewhere is noticed, and code that nobody knows is called."""

from __future__ import annotations

import time
import types
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.moe.test_changed_experts import Expert, layer_with, off_by, output_of, replaced

LIBRARY = types.ModuleType("library")
LIBRARY.act = lambda x: F.gelu(x)


class FromLibrary(Expert):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(LIBRARY.act(self.fc1(x)))
        return y


def test_a_function_that_changes_in_a_file_of_code_is_noticed() -> None:
    layer, expert = layer_with(FromLibrary())
    assert layer.experts.form is not None
    with replaced(LIBRARY, "act", torch.tanh):
        assert off_by(output_of(layer), expert) < 1e-5
    assert off_by(output_of(layer), expert) < 1e-5


def from_a_tuple(x: Tensor) -> Tensor:
    return F.gelu(x)


from_a_tuple.__module__ = "transformers.activations"  # a name behind "torch" in the alphabet
STEPS = (from_a_tuple,)


class FromTuple(Expert):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(STEPS[0](self.fc1(x)))
        return y


def test_a_function_of_a_tuple_whose_code_changes_is_noticed() -> None:
    layer, expert = layer_with(FromTuple())
    assert layer.experts.form is not None
    with replaced(from_a_tuple, "__code__", (lambda x: x.tanh()).__code__):
        assert off_by(output_of(layer), expert) < 1e-5
    assert off_by(output_of(layer), expert) < 1e-5


class OfTorch(Expert):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(torch._C._nn.gelu(self.fc1(x)))
        return y


class Clocked(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if time.time() > 0 else x


class Summed(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if zlib.crc32(b"") == 0 else x


def test_of_functions_in_c_those_of_torch_are_known_and_other_libraries_are_called_each_time() -> None:
    layer, expert = layer_with(OfTorch())
    assert layer.experts.form is not None
    assert off_by(output_of(layer), expert) < 1e-5
    for expert_class in (Clocked, Summed):
        layer, expert = layer_with(expert_class())
        assert layer.experts.form is None, expert_class.__name__
        assert off_by(output_of(layer), expert) < 1e-5, expert_class.__name__
    with replaced(time, "time", lambda: -1.0):
        layer, expert = layer_with(Clocked())
        x = torch.randn(3, 8)
        assert torch.equal(layer(x)[0], x)
