"""Proves that nothing which must not change a result does: mesh, transport, remat, microbatches.

`outcome.py` runs one step of a variant exactly as training does, `variants.py` lists the variants,
`compare.py` says how far two outcomes are apart, and `verify.py` puts them together.
"""
