"""Routers: one method per file, called as `router(x [T, D], context) -> (Routing, carry)`.

A router reads the number of experts from `context.num_experts`. `carry` is a per-token value
handed to the next MoE layer's router as `context.router_carry`, or None.
"""
