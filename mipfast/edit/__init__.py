"""What is done to the chosen neurons: a path, a prune, training."""
