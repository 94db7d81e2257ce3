from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from mollm.trainer_callbacks import DivergenceStop


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((0.1, 0.2, 5.0), None),
        ((float("nan"), 0.2, 5.0), "the forget loss must be finite, but in step 2 it is nan"),
        ((0.1, 6.0, 5.0), "the kl loss must not grow by more than 5 nats"),
        ((0.1, 0.2, 9.1), "the retain loss must not grow by more than 5 nats"),
        ((-50.0, 0.2, 5.0), None),  # the loss of gradient ascent has no lower bound
    ],
)
def test_what_stops_a_run(losses, words):
    history = [
        SimpleNamespace(losses=dict(zip(("forget", "kl", "retain"), values, strict=True)))
        for values in ((0.1, 0.0, 4.0), losses)
    ]
    callback, control = DivergenceStop(history), TrainerControl()
    callback.on_step_end(SimpleNamespace(divergence=5.0), None, control)
    assert control.should_training_stop is (words is not None)
    assert (words is None) if callback.reason is None else (words in callback.reason)
