"""Catalogues, their governance, and the stateless reading of samples."""
