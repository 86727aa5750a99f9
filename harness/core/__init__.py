"""Shared by all other folders: command line, errors, files, locks, keyed randomness, process groups."""
