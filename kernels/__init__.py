"""Fused kernels, each with a plain-torch twin that is also its specification."""
