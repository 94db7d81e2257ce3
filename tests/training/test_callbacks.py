from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from mollm.training.callbacks import DivergenceStop
from mollm_ops import Status


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
    reason = stopped([record((0.1, 0.0, 4.0)), record(losses)])
    assert (words is None) if reason is None else (words in reason)


@pytest.mark.parametrize(("skipped", "made"), [(10, 0), (9, 0), (10, 1)])
def test_a_run_of_skipped_steps_alone_is_stopped(skipped, made):
    steps = [record((0.1, 0.2, 5.0), Status.NON_FINITE)] * skipped
    reason = stopped([*steps, *[record((0.1, 0.2, 5.0))] * made])
    if (skipped, made) == (10, 0):
        assert "10 steps were skipped in a row" in reason
    else:
        assert reason is None


@pytest.mark.parametrize(
    ("statuses", "first", "words"),
    [
        ("oxx", 0, "2 of 3 steps were skipped"),
        ("ox", 0, "1 of 2 steps were skipped"),
        ("oxo", 0, None),
        ("oooox", 0, None),
        ("oooox", 4, "all 1 steps were skipped"),
        ("xx", 0, "all 2 steps were skipped"),
        ("", 0, None),
    ],
)
def test_a_run_that_skipped_half_of_its_steps_is_no_success(statuses, first, words):
    kinds = {"o": Status.SOLVED, "x": Status.NON_FINITE}
    callback = DivergenceStop([record((0.1, 0.0, 4.0), kinds[s]) for s in statuses], ["retain"])
    callback.first = first
    callback.at_the_end(None, [], 5.0)
    assert (words is None) if callback.reason is None else (words in callback.reason)


def record(losses, status=Status.SOLVED):
    named = dict(zip(("forget", "kl", "retain"), losses, strict=True))
    return SimpleNamespace(losses=named, status=status.name)


def stopped(history):
    callback, control = DivergenceStop(history, ["retain"]), TrainerControl()
    callback.on_step_end(SimpleNamespace(max_loss_rise=5.0), None, control)
    assert control.should_training_stop is (callback.reason is not None)
    return callback.reason
