"""A file of a checkpoint that would run code runs none, by whatever opcodes of pickle and form of file it says it.

The control: read as any pickle, each of them makes a folder.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.loading.mapped import MappedFiles
from ds_moe_ep.engine.extensions.callback import LoadCall
from ds_moe_ep.errors import EngineError

EXTENSION = 0xF0  # of copyreg's registry: for private use


class MadeByReduce:
    """Makes a folder where a function is called."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.place,)


class MadeByNew:
    """Makes a folder where an object is made."""

    def __new__(cls, place: str) -> MadeByNew:
        if not Path(place).is_dir():
            os.mkdir(place)
        made = super().__new__(cls)
        made.__dict__["place"] = place
        return made

    def __getnewargs__(self) -> tuple[str]:
        return (self.place,)


class MadeByNewWithNames(MadeByNew):
    """The same with an argument by name."""

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, str]]:
        return (), {"place": self.place}


class MadeByState:
    """Makes a folder where an object gets its state."""

    def __getstate__(self) -> dict[str, str]:
        return vars(self)

    def __setstate__(self, state: dict[str, str]) -> None:
        os.mkdir(state["place"])


def of_objects(place: str) -> Iterator[tuple[str, bytes]]:
    """Pickles of objects that make the folder, by the kind of object and the protocol."""
    with_state = MadeByState()
    with_state.__dict__["place"] = place
    # Protocols before the first one do without `__new__`, or its names.
    firsts = {MadeByReduce(place): 0, MadeByNew(place): 2, MadeByNewWithNames(place): 4, with_state: 0}
    os.rmdir(place)  # the second made it
    for each, first in firsts.items():
        for protocol in range(first, pickle.HIGHEST_PROTOCOL + 1):
            yield f"{type(each).__name__}, protocol {protocol}", pickle.dumps(each, protocol)


def of_opcodes(place: str) -> Iterator[tuple[str, bytes]]:
    """Pickles by hand: opcodes that `pickle.dumps` writes seldom or never."""
    path = f"V{place}\n".encode()
    yield "INST", b"(" + path + b"ios\nmkdir\n."
    yield "OBJ", b"(cos\nmkdir\n" + path + b"o."
    yield "GLOBAL by another name", b"cposix\nmkdir\n(" + path + b"tR."
    yield "EXT1", b"\x82" + bytes([EXTENSION]) + b"(" + path + b"tR."
    yield "EXT4", b"\x84" + EXTENSION.to_bytes(4, "little") + b"(" + path + b"tR."
    yield "a function out of an attribute", b"cbuiltins\ngetattr\n(cos\n__dict__\nVget\ntR(Vmkdir\ntR(" + path + b"tR."
    yield "code as text", b"cbuiltins\nexec\n(V__import__('os').mkdir('" + place.encode() + b"')\ntR."
    yield "from a memo", b"cos\nmkdir\np0\n0g0\n(" + path + b"tR."
    yield "behind a value", b"K\x010cos\nmkdir\n(" + path + b"tR."


def as_file(path: Path, form: str, crafted: bytes) -> None:
    """Writes the pickle as the content of a file of torch's, or in another form that a reader may take for one."""
    torch.save({"module": {}}, path)
    if form == "legacy":
        path.write_bytes(crafted)
        return
    with zipfile.ZipFile(path) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, part in parts:
            is_pickle = name.endswith("data.pkl")
            archive.writestr(name, crafted if is_pickle and form != "script" else part)
        if form == "script":
            archive.writestr(f"{parts[0][0].split('/')[0]}/constants.pkl", crafted)
    path.write_bytes((crafted if form == "both" else b"") + content.getvalue())


def readers() -> dict[str, Callable[[Path], Any]]:
    """What the package reads a file with: before a load, and in the place of DeepSpeed's own reader while it loads."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    checkpoints = TorchCheckpointEngine()
    engine = SimpleNamespace(checkpoint_engine=checkpoints, optimizer=None)

    def while_loading(path: Path) -> Any:
        load = LoadCall(str(path.parent), None, (), {})
        return MappedFiles(engine).around_load(load, lambda _: checkpoints.load(str(path), map_location=None))

    return {"mapped": load_file, "read": lambda path: load_file(path, is_mapped=False), "loading": while_loading}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_crafted_file_runs_nothing(tmp_path: Path) -> None:
    place, path = tmp_path / "it ran", tmp_path / "mp_rank_00_model_states.pt"
    copyreg.add_extension("os", "mkdir", EXTENSION)  # type: ignore[no-untyped-call]
    try:
        crafted = [*of_objects(str(place)), *of_opcodes(str(place))]
        for name, content in crafted:
            pickle.loads(content)
            assert place.is_dir(), f"the control: {name}"
            place.rmdir()
            for form in ("torch's", "legacy", "both", "script"):
                as_file(path, form, content)
                for kind, read in readers().items():
                    with pytest.raises(EngineError, match=r"mp_rank_00_model_states\.pt: (holds|cannot|is cut off)"):
                        read(path)
                    assert not place.exists(), (name, form, kind)
    finally:
        copyreg.remove_extension("os", "mkdir", EXTENSION)  # type: ignore[no-untyped-call]
    as_file(path, "torch's", pickle.dumps({"module": {"steps": 7}}, 2))
    assert all(read(path) == {"module": {"steps": 7}} for read in readers().values()), "the control: plain values load"
