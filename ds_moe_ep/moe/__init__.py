"""The expert-parallel layer for torch users: no DeepSpeed, no globals, groups come as arguments."""
