"""Made-up machines for the doctor: one of CPUs, one node of a GPU cluster; tests change what they are about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ds_moe_ep.doctor.facts import ApexFacts, DeepSpeedFacts, Facts, Gpu, HostFacts, TorchFacts, TritonFacts
from ds_moe_ep.doctor.verdicts import STATUSES, Verdict

HOST = HostFacts(
    name="node1",
    cores=96,
    free_bytes=1 << 40,
    shm_bytes=1 << 36,
    open_files=65536,
    addresses=("10.0.0.1",),
    interfaces=("lo", "eth0", "ib0"),
    compiler="/usr/bin/c++",
    launcher="/env/bin/deepspeed",
    launcher_beside="/env/bin/deepspeed",
)
VERSIONS = {"transformers": None, "accelerate": None, "nvidia-ml-py": "13", "mpi4py": "4"}
CPU = Facts(
    versions=VERSIONS,
    torch=TorchFacts(version="2.13.0+cpu"),
    deepspeed=DeepSpeedFacts(version="0.19.8", tested=("0.19.8",)),
    host=HOST,
    environment={"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
)
H100 = Gpu("NVIDIA H100 80GB HBM3", 85_000_000_000, (9, 0))
GPUS = replace(
    CPU,
    torch=TorchFacts(version="2.13.0", cuda="12.8", nccl="2.27.5", devices=(H100,) * 4),
    triton=TritonFacts(version="3.7.1", compiled=True),
    apex=ApexFacts(place="/env/apex", has_normalization=True, offers=("layer norm", "dense-GELU-dense")),
    host=replace(HOST, adapters=("mlx5_0", "mlx5_1", "mlx5_2"), num_gpu_files=4),
    environment={
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NCCL_IB_HCA": "mlx5_0,mlx5_1",
        "NCCL_SOCKET_IFNAME": "ib0",
        "NCCL_NTHREADS": "512",
    },
)


def on_host(facts: Facts, **changes: Any) -> Facts:
    """`facts` with another host."""
    return replace(facts, host=replace(facts.host, **changes))


def with_variables(facts: Facts, **variables: str) -> Facts:
    """`facts` with these variables set."""
    return replace(facts, environment={**facts.environment, **variables})


def named(verdicts: list[Verdict], name: str) -> Verdict:
    """The worst verdict of that name."""
    return max((each for each in verdicts if each.name == name), key=lambda each: STATUSES.index(each.status))
