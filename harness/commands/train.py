"""`shelfmark train`: Train a model by a recipe; also as `torchrun … -m harness.train`."""

from harness.train.run import train as main

__all__ = ["main"]
