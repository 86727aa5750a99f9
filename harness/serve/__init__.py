"""The search service: one process, one artefact, one page."""
