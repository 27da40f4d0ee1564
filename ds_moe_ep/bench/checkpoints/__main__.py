"""The benchmark as a command of its own."""

import sys

from ds_moe_ep.bench.checkpoints.command import main

if __name__ == "__main__":
    sys.exit(main())
