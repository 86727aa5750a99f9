"""Catalogues: files of checked samples under global ids."""
