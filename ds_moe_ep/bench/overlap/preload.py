"""Imports of a rank, for the one process of which all ranks are forks."""

import os

os.environ |= {"DS_ACCELERATOR": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # deepspeed reads them when it is imported

from ds_moe_ep.bench.candidates import autoep, native
from ds_moe_ep.bench.overlap import ranks

__all__ = ["autoep", "native", "ranks"]
