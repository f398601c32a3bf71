"""Training: model and adapters, the loss, the loop, checkpoints and the merge."""
