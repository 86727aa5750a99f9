"""Exported artefacts: query encoder, id map and index, opened for search. `from harness.artefact import Artefact`."""

from harness.artefact.artefact import Artefact, Hit, Photo

__all__ = ["Artefact", "Hit", "Photo"]
