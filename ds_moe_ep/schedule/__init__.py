"""The one idea: a pass as data, which is run, priced, simulated and proven sound."""
