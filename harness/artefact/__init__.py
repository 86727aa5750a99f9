"""Exported artefacts: query encoder, id map and index, opened for search."""
