"""Python's door to exported artefacts, installed as the package `shelfmark`: `from shelfmark import Artefact`."""

from harness.artefact import Artefact, Hit, Photo

__all__ = ["Artefact", "Hit", "Photo"]
