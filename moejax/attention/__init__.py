"""Attention: one method per file, called as `attention(x [B, S, D], context) -> [B, S, D]`.

A method may have `full()`, which returns the method that attends every earlier key with the same
parameters (`model.last_k_full`), `at_step(step)` where what it computes depends on the step, and
`mean_keys(length)` with `mean_scores(length)` where it attends fewer keys (`models/flops.py`).
"""
