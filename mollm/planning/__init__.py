"""The memory of a training step, predicted before anything is loaded."""
