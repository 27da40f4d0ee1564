"""A file that DeepSpeed lets several ranks of a save write at once is written by one of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from ds_moe_ep.engine.checkpoint.save import Written
from tests.ranks import RankPool

EXPERTS = {
    f"layer_{layer}_expert_{expert}_mp_rank_0{expert // 4}_model_states.pt" for layer in (0, 1) for expert in range(8)
}


@pytest.mark.parametrize("stages", [False, True])
def test_the_first_rank_of_a_save_writes_a_file_and_anybody_outside_of_one(tmp_path: Path, stages: bool) -> None:
    engines = [TorchCheckpointEngine(), TorchCheckpointEngine()]
    ranks = [Written(engine) for engine in engines]
    path = tmp_path / "states.pt"
    with ranks[0].in_new_folder(stages), ranks[1].in_new_folder(stages):
        for number, engine in enumerate((engines[0], engines[1], engines[0])):
            engine.save({"number": number}, str(path))
    assert [len(rank.staged) for rank in ranks] == [2 * stages, 0]
    for file in ranks[0].staged:
        file.write()
    assert torch.load(path)["number"] == 2
    engines[1].save({"number": 3}, str(path))
    assert torch.load(path)["number"] == 3


def writers(folder: str) -> dict[str, Counter[str]]:
    """How many ranks wrote each file of a checkpoint, by the layout of an engine. Collective."""
    import ds_moe_ep
    from tests.verification.layouts import MORE_OF_LAYOUTS

    ds_moe_ep.init_distributed()
    names = ("sequence ranks, Megatron's", "folded AutoEP", "folded AutoEP, ZeRO 2", "folded AutoEP, plain")
    layouts = {layout.name: layout for layout in MORE_OF_LAYOUTS}
    return {name: of_layout(layouts[name], folder) for name in names}


def of_layout(layout: Any, folder: str) -> Counter[str]:
    save, paths = TorchCheckpointEngine.save, list[str]()

    def noted(self: TorchCheckpointEngine, state_dict: Any, path: str) -> None:
        paths.append(Path(path).name)
        save(self, state_dict, path)

    with patch.object(TorchCheckpointEngine, "save", noted):
        engine = layout.make()
        layout.step(engine, layout.endless(engine))
        engine.save_checkpoint(folder, tag=layout.name.replace(" ", ""))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, paths)
    return Counter(path for theirs in found for path in theirs)


@pytest.mark.slow
def test_no_layout_lets_two_ranks_write_a_file(pool: RankPool, tmp_path: Path) -> None:
    found = pool.run(4, writers, str(tmp_path), timeout_s=200)[0]
    plain = found.pop("folded AutoEP, plain")
    assert {path for path, count in plain.items() if count > 1} >= EXPERTS, "the control: DeepSpeed's own save"
    for name, files in found.items():
        assert set(files.values()) == {1}, name
    assert all(set(found[name]) >= EXPERTS for name in found if name.startswith("folded"))
