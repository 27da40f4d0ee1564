"""A flipped bit in a file of safetensors that the package wrote is refused by the tensor's name, or changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ds_moe_ep.engine.hugging_face.checked_files import write_tensors
from ds_moe_ep.engine.hugging_face.load import SINGLE, Weights
from ds_moe_ep.errors import EngineError

TENSORS = {
    "gate.weight": torch.arange(32.0).sin().view(4, 8).bfloat16(),
    "experts.w1": torch.arange(48.0).cos().view(2, 3, 8),
    "scale": torch.tensor(3.0),
}


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor; of the stack one place after the other."""
    with Weights(folder) as weights:
        places = [weights.read("experts.w1", index) for index in range(2)]
        return {"experts.w1": torch.stack(places), **{name: weights.read(name) for name in ("gate.weight", "scale")}}


def same(found: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())


@pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_flipped_bit_is_refused_or_changes_nothing_that_is_read(step: int, tmp_path: Path) -> None:
    """The control: safetensors itself reads other numbers without a word."""
    path = tmp_path / SINGLE
    write_tensors(TENSORS, path)
    assert same(read(tmp_path)) and same(load_file(path))
    content, damaged, silent = path.read_bytes(), 0, 0
    for bit in range(8 * len(content) - 1, -1, -step):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert same(read(tmp_path)), f"bit {bit} passes silently"
        except EngineError as error:
            is_of_tensor = "is damaged, its checksum does not fit" in str(error)
            damaged += is_of_tensor
            silent += is_of_tensor and not same(load_file(path))
    assert damaged >= silent > 8 * sum(value.nbytes for value in TENSORS.values()) // step - 2


def test_files_without_checksums_are_read_as_they_are(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / SINGLE, {"format": "pt"})
    assert same(read(tmp_path))
