"""Search per-layer key and value bit-widths for the KV cache, and keep the result as a reviewed profile."""

__version__ = "0.1.0"
