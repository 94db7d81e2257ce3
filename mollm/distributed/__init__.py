"""Several processes: sharded gradients in any loop, and the collectives of the trainer."""

from mollm.distributed.sharding import answer_tokens, expect_backward

__all__ = ["answer_tokens", "expect_backward"]
