"""Governance: training classes made of a class column, or of a click log."""
