"""The script beside a checkpoint that makes one file of weights in fp32 of it.

DeepSpeed's `zero_to_fp32.py` does not know experts' files, and takes one rank's parameters for those of all: it
ends with an error where ranks hold different experts. There a script of the same name and arguments takes its place,
which calls `convert`; of AutoEP's layers that tells the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_moe_ep.engine import seams

NAME = "zero_to_fp32.py"
SCRIPT = '''#!/usr/bin/env python
"""Writes the weights of this checkpoint in fp32, every expert by its global index, as files of safetensors.

The same as: python -m ds_moe_ep convert CHECKPOINT_DIR OUTPUT_DIR --to fp32 [--tag TAG]
"""

import argparse
import sys

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint_dir", help="the folder with `latest`")
parser.add_argument("output_dir", help="the folder to make")
parser.add_argument("-t", "--tag", help="default: the one that `latest` names")
given = parser.parse_args()

from ds_moe_ep.cli.main import main

tag = [] if given.tag is None else ["--tag", given.tag]
sys.exit(main(["convert", given.checkpoint_dir, given.output_dir, "--to", "fp32", *tag]))
'''


def replace_script(engine: Any, save_dir: Path) -> None:
    """Puts the script in the place of DeepSpeed's where experts lie on several ranks. By one rank."""
    layers = [module for module in engine.module.modules() if seams.is_moe_layer(module)]
    is_partitioned = engine.zero_optimization_partition_weights()  # under ZeRO-3 AutoEP's experts lie in ZeRO's files
    script = save_dir / NAME
    if script.is_file() and not is_partitioned and any(int(each.ep_size) > 1 for each in layers):
        fresh = script.with_name(f"{NAME}.saving")
        fresh.write_text(SCRIPT, encoding="utf-8")
        fresh.chmod(script.stat().st_mode)
        fresh.replace(script)
