"""Names of options and sizes that the optimizer and the planner share; loads no Torch."""

from __future__ import annotations

PER_OBJECTIVE = "per-objective"
"""As momentum."""
MODEL, BLOCKS = "model", "blocks"
"""As gram."""
STREAMED = "streamed"
"""As gradient_memory."""
MEMORIES = ("as-produced", "bfloat16", "host", STREAMED)
BUCKET_BYTES = 256 << 20
"""Of gradients, or of a wide state, that a step works on at a time."""
EIGHT_BITS = "8bit"
"""As state_dtype."""
ELEMENTS_PER_SCALE = 256
"""Of a state in 8 bits."""
