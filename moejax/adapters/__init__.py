"""Adapters: what is added to the projections of a frozen model, one method per file.

An adapter is a `Linear` whose `params` are those of the projection that it replaces and whose own
leaves lie in the collection `lora`: `(x, context) -> y`. With fresh leaves it gives what the
projection gives, bit for bit.
"""
