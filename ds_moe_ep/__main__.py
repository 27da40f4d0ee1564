"""`python -m ds_moe_ep`: the command line."""

import sys

from ds_moe_ep.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
