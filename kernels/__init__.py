"""Tensor operations of the hot path: plain-torch truths, and one door to their fast forms."""

# transformers probes an importable package called `kernels` and compares its version with a
# window of its own; this value keeps ours outside of it (docs/adr/0005-package-names.md).
__version__ = "0.0.0"
