"""Routers: one method per file, called as `router(x [T, D], context) -> (Routing, carry)`.

A router reads the number of experts from `context.num_experts`. What it returns at padding is
dropped, but nothing it computes across tokens, and nothing in `Routing.extras`, may count
padding (`context.token_mask`).

`carry` is a per-token value handed to the next MoE layer's router as `context.router_carry`, or
None. A router with a carry defines `initial_carry(num_tokens) -> carry`, which the first one gets.
"""
