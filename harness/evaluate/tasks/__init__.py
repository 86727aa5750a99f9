"""Evaluation tasks, one file each, found by name in registry.py."""
