"""Towers, fusion, heads and the three retrieval methods. Knows nothing of files, flags or schedulers."""
