"""Mixtures of adapters: which of several a token gets (routers), and what they are (banks).

A router gives every adapter a weight for every token, `(x, context) -> Mixture`; a bank turns input
and weights into what is added to a projection. They meet in rank space: nothing of the size tokens
x adapters x output width exists. `adapters.mixed.MixedLinear` puts one of each beside a projection.
"""
