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
def test_the_prediction_is_within_a_tenth_of_what_each_process_allocates(case, measured):
    shape = shape_of(tiny.model(**sharded_memory.SIZES).config, "tiny")
    predicted = plan(shape, sharded_memory.settings(*case))
    lasting = sum(planning._lasting(shape, predicted.settings).values())
    step = predicted.peak.total - lasting
    for each in measured:
        peak = each.get(case, "not reached")
        assert isinstance(peak, int), peak
        print(f"{predicted.peak.name}: {step / peak - 1:+.1%} of {peak / 1e6:.1f} MB")
        assert step == pytest.approx(peak, rel=0.1)
