"""What a training step needs on a cluster, found by compiling it for that cluster here.

`plan.py` is the entry: an experiment and a topology in, a `Plan` out. Memory, FLOPs and collectives
are read from the program that XLA makes; the step's time is an estimate from them.
"""
