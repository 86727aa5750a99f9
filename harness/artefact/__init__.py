"""Exported artefacts: query encoder, id map and index, opened for search. `from shelfmark import Artefact`."""

from harness.artefact.artefact import Artefact, Hit, Photo

__all__ = ["Artefact", "Hit", "Photo"]
