"""The peak of a streamed step in shards, beside what two gloo processes allocate."""

from __future__ import annotations

import pytest
import sharded_memory
import tiny

from mollm.planning import memory as planning
from mollm.planning.memory import plan
from mollm.planning.shapes import shape_of

CASES = [("model", "float32"), ("blocks", "float32"), ("model", "bfloat16")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return sharded_memory.run(tmp_path_factory.mktemp("peaks"), CASES)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_the_prediction_is_within_a_tenth_of_what_processes_allocate(case, measured):
    shape = shape_of(tiny.model(**sharded_memory.SIZES).config, "tiny")
    predicted = plan(shape, sharded_memory.settings(*case))
    lasting = sum(planning._lasting(shape, predicted.settings).values())
    step = predicted.peak.total - lasting
    peaks = [each.get(case, "not reached") for each in measured]
    assert all(isinstance(peak, int) for peak in peaks), peaks
    print(f"{predicted.peak.name}: {step / min(peaks) - 1:+.1%} of {min(peaks) / 1e6:.1f} MB")
    assert step == pytest.approx(min(peaks), rel=0.1)
