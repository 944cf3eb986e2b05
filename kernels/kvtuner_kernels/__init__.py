"""Quantize, pack, gather and attend over a packed KV cache.

Importing this package is cheap: :mod:`kvtuner_kernels.layout` is pure Python, and torch is imported only by
:mod:`kvtuner_kernels.reference`.
"""
