"""Triton kernels, one operation a file; `kernels.dispatch` is the only door to them outside of tests."""
