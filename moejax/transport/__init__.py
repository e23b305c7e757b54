"""Transports: how tokens and expert weights meet.

A transport is a function without parameters,

    apply(x [T, D], routing, weights, compute, axes=None) -> (y [T, D], counts)

where `compute(rows [R, D], local_ids [R, K], gate [R, K], weights) -> [R, D]` is pure and `axes`
are the logical axes of each weight (None: a leading axis of experts, and the rest whole). It never
drops a choice silently: `counts["dropped"]` is the number of choices that were not computed.
"""
