"""What the model still knows: accuracy, likelihoods, metrics, attacks."""
