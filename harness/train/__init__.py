"""Training: configuration, trainer, checkpoints, optimizer, logs; dry runs of a step."""
