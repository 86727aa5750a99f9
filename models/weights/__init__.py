"""Weights of other projects in and out of our towers: which tensor is which, in both directions, without loss.

Imports neither megatron-core nor harness.
"""
