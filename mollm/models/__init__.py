"""Models: loading, their head and final hidden states, precision, adapters."""
