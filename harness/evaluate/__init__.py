"""Evaluation: embedding, exact ranking, metrics, tasks."""
