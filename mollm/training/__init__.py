"""MOLLMTrainer and its pieces: objectives, reference model, step, checkpoints."""
