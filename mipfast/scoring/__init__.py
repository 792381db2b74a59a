"""Which neurons carry an answer: integrated gradients along a path through the layers."""
