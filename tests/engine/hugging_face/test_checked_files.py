"""A flipped bit in a file of safetensors that the package wrote is refused by the tensor's name, or changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ds_moe_ep.engine.hugging_face.checked_files import CheckedFile, TensorForm, write_made
from ds_moe_ep.engine.hugging_face.load import SINGLE, Weights
from ds_moe_ep.errors import EngineError
from tests.engine.checkpoint.live_bytes import LiveBytes

TENSORS = {
    "gate.weight": torch.arange(32.0).sin().view(4, 8).bfloat16(),
    "experts.w1": torch.arange(48.0).cos().view(2, 3, 8),
    "scale": torch.tensor(3.0),
}


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    write_made({name: (TensorForm.of(tensor), lambda each=tensor: each) for name, tensor in tensors.items()}, path)


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


def test_one_tensor_at_a_time_is_made_while_many_are_written(tmp_path: Path) -> None:
    """Of tensors that lie in one run nothing is; the control: the copies of all of them are seen to live together."""
    rows = torch.arange(4096.0).view(64, 64)
    turned = {f"turned {number}": (rows + number).t() for number in range(5)}
    plain = {f"plain {number}": rows + number for number in range(5)}
    for tensors, bound in ((plain, 0), (turned, rows.nbytes)):
        with LiveBytes() as live:
            write_tensors(tensors, tmp_path / SINGLE)
        assert live.most == bound
        found = load_file(tmp_path / SINGLE)
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], each) for name, each in tensors.items())
    with LiveBytes() as live:
        copies = [tensor.contiguous() for tensor in turned.values()]
    assert live.most == len(copies) * rows.nbytes


def test_a_stack_is_written_place_by_place_and_read_whole_and_by_place(tmp_path: Path) -> None:
    places = {"stack": torch.randn(3, 4, 5).half(), "biases": torch.randn(3, 4)}
    forms = {name: TensorForm(each.dtype, tuple(each.shape), is_stack=True) for name, each in places.items()}
    forms["small"] = TensorForm(torch.int8, (3,))
    path = tmp_path / SINGLE
    with path.open("wb") as opened:
        file = CheckedFile(opened, forms)
        for index in (2, 0, 1):
            for name, each in places.items():
                file.write(name, each[index], index)
        file.write("small", torch.tensor([1, 2, 3], dtype=torch.int8))
        file.finish()
    found = load_file(path)
    assert all(torch.equal(found[name], each) for name, each in places.items())
    assert found["small"].tolist() == [1, 2, 3]
    with Weights(tmp_path) as weights:
        for name, each in places.items():
            assert torch.equal(weights.read(name), each)
            assert all(torch.equal(weights.read(name, index), each[index]) for index in range(3))
    content = bytearray(path.read_bytes())
    content[content.index(places["biases"][1].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with Weights(tmp_path) as weights:
        assert torch.equal(weights.read("biases", 0), places["biases"][0])
        with pytest.raises(EngineError, match="biases is damaged"):
            weights.read("biases", 1)
        with pytest.raises(EngineError, match="biases is damaged"):
            weights.read("biases")


def test_a_type_that_files_do_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"phase: is torch\.complex64, which files of safetensors do not hold"):
        write_tensors({"phase": torch.zeros(2, dtype=torch.complex64)}, tmp_path / SINGLE)
