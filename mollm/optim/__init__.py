"""MOLLMOptimizer and its pieces: bases, directions, gradients, running means, reports."""
