"""MoE training in JAX without silent wrongness."""
