"""`python -m ds_moe_ep doctor`: what is installed and usable here, what works against a run, and what the links do.

Facts are gathered first (gather.py, probe.py, build_locks.py, links/ranks.py), then judged by functions that get all
that they need. People read the conclusion first, then from bad to good; JSON has every verdict.
"""
