"""Hugging Face's Trainer and `save_16bit_model` write the whole model, whoever made its MoE layers.

fp32: 2e-6 of the largest logit is the order of sums over two experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

import ds_moe_ep
from tests.engine.hugging_face import tiny_models
from tests.engine.hugging_face.tiny_models import VOCABULARY, distance, token_ids
from tests.ranks import run_ranks

BOUND, WIDTH, NUM_EXPERTS, EP_SIZE = 2e-6, 16, 4, 2
MAKERS = ("MoE", "DeepSpeed's", "AutoEP's")


class Net(nn.Module):
    """Two blocks of experts between an embedding and a head."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(make() for _ in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        balance = x.new_zeros(())
        for block in self.blocks:
            y, l_aux, _ = block(x)
            x, balance = x + y, balance + l_aux
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) + balance, "logits": logits}


def own_layer(ep_size: int = EP_SIZE) -> nn.Module:
    config = ds_moe_ep.MoEConfig(num_experts=NUM_EXPERTS, ep_size=ep_size, top_k=2)
    return ds_moe_ep.MoE(WIDTH, ds_moe_ep.GeluMLP(WIDTH, 2 * WIDTH), config=config)


def deepspeeds_layer() -> nn.Module:
    from deepspeed.moe.layer import MoE

    return MoE(
        WIDTH, ds_moe_ep.GeluMLP(WIDTH, 2 * WIDTH), num_experts=NUM_EXPERTS, ep_size=EP_SIZE, k=2, drop_tokens=False,
        use_rts=False, top2_2nd_expert_sampling=False,
    )  # fmt: skip


def make_model(maker: str) -> Any:
    if maker == "AutoEP's":
        return tiny_models.make_model("mixtral")
    torch.manual_seed(dist.get_rank())  # each rank draws its own experts; DeepSpeed makes the rest alike
    return Net({"MoE": own_layer, "DeepSpeed's": deepspeeds_layer}[maker])


def trained(maker: str, folder: Path) -> Tensor:
    """Logits of the trained model, whose files lie in the folder: the Trainer's, and DeepSpeed's. Collective."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Attach(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ds_moe_ep.attach_overlap(trainer.model_wrapped, None if maker == "MoE" else {"schedule": "peers"})

    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate takes one plugin a process
    autoep = {"autoep_size": EP_SIZE, "preset_model": "mixtral"} if maker == "AutoEP's" else None
    config = tiny_models.ds_config(1, autoep) | {"train_micro_batch_size_per_gpu": 2}
    ids = token_ids(count=16)
    arguments = TrainingArguments(
        str(folder / "runs"), deepspeed=config, per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2,
        adam_epsilon=config["optimizer"]["params"]["eps"],
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    data = [{"input_ids": each, "labels": each} for each in ids]
    trainer = Trainer(make_model(maker), arguments, train_dataset=data)
    trainer.add_callback(Attach())
    trainer.train()
    trainer.save_model(str(folder / maker))
    trainer.model_wrapped.save_16bit_model(str(folder), f"{maker}.bin")
    model = trainer.model.eval()
    with torch.no_grad():
        answer = model(input_ids=token_ids())
    dist.barrier()
    found: Tensor = answer["logits"]
    return found


def all_trained(folder: Path) -> list[Tensor]:
    ds_moe_ep.init_distributed(dist_backend="gloo", verbose=False)
    return [trained(maker, folder) for maker in MAKERS]


def whole(maker: str, folder: Path) -> Any:
    """The model of the Trainer's files in one process."""
    if maker == "AutoEP's":
        return tiny_models.load(folder / maker)
    model = Net(lambda: own_layer(ep_size=1))
    model.load_state_dict(load_file(folder / maker / "model.safetensors"))
    return model.eval()


@pytest.mark.slow
def test_the_trainers_files_and_deepspeeds_hold_the_whole_model(tmp_path: Path) -> None:
    by_rank = run_ranks(2, all_trained, tmp_path, timeout_s=200)
    for index, maker in enumerate(MAKERS):
        model = whole(maker, tmp_path)
        with torch.no_grad():
            logits = model(input_ids=token_ids())["logits"]
        for found in by_rank:
            assert distance(found[index], logits) <= BOUND, maker
        of_trainer = load_file(tmp_path / maker / "model.safetensors")
        of_engine = torch.load(tmp_path / f"{maker}.bin")
        assert of_engine.keys() == of_trainer.keys(), maker
        assert all(torch.equal(of_engine[name], weight) for name, weight in of_trainer.items()), maker
        assert sum(".experts." in name and name.endswith("weight") for name in of_trainer) >= 2 * 2 * NUM_EXPERTS
    own = whole("MoE", tmp_path)
    experts = [each.fc1.weight for each in own.blocks[0].deepspeed_moe.experts.deepspeed_experts]
    assert not torch.equal(experts[0], experts[2]), "the control: ranks have experts of their own"
