"""A parent process that ends a training process which is stuck, and says which one is.

It knows nothing of JAX and imports nothing that could hang; `train/phases.py` is the other end.
"""
