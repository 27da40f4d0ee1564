"""`python -m ds_moe_ep doctor`: what is installed and usable here, what works against a run, and what the links do.

Facts are gathered first (`gather`, `probe`, `link_ranks`), then judged by functions that are told all they need.
"""
