"""Training runs: what the scripts of a run share, whatever they train.

options, command   the command line, and the one that continues a run
preparation        what is read and checked before the engine starts, and refused once (world: how ranks meet)
checkpoints        where a run keeps them: tried before the first step, written every so often and at the end
display            a few live lines in a terminal, plain lines elsewhere
ending             signals, and errors in a line
"""
