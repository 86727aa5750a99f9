"""What runs a job: configuration, mesh, data, governance, training loop, checkpoint, evaluation."""
