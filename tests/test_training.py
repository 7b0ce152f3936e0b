"""Training end to end: exactly num_steps updates, resuming bit for bit, divergence, refusals."""
