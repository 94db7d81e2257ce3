"""Evaluations of an original that are kept for the next time."""

import stat

import pytest
import tiny

pytest.importorskip("transformers")

from tokenizers import normalizers

from mollm.evaluation import Estimate, Evaluation, Record, Row, Suite, load_suite
from mollm.evaluation.cache import cache_folder, cached, key_of

ROWS = [{"question": f"Is it secret {n}?", "answer": f"Quite {n}."} for n in range(2)]
MADE = Evaluation(
    tuple(Record("forget", r["question"], r["answer"], "Well.", {"nll": 1.0}) for r in ROWS),
    {"nll": Estimate(1.0, 0.5, 1.5, 2)},
    {},
)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder()


def test_what_is_kept_comes_back_as_it_was_made():
    suite = load_suite(ROWS)
    assert cached("key", suite, lambda: MADE) == (MADE, False)
    assert cached("key", suite, lambda: None) == (MADE, True)


def test_only_the_user_may_read_it_and_it_holds_no_questions_and_answers(kept):
    cached("key", load_suite(ROWS), lambda: MADE)
    paths = [kept, *kept.rglob("*")]
    assert len(paths) == 4
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
        text = "" if path.is_dir() else path.read_text()
        assert "secret" not in text
        assert "Quite" not in text


def test_records_about_another_suite_are_made_anew():
    cached("key", load_suite(ROWS), lambda: MADE)
    other = load_suite(ROWS, retain=ROWS)
    assert cached("key", other, lambda: MADE)[1]
    broken = Evaluation((*MADE.records, *MADE.records), MADE.estimates, {})
    cached("more", load_suite(ROWS), lambda: broken)
    assert cached("more", load_suite(ROWS), lambda: MADE) == (MADE, False)


def test_rows_that_were_left_out_do_not_shift_the_texts_of_others():
    rows = [*ROWS, {"question": "Is it long?", "answer": "Quite."}, *ROWS[:1]]
    some = tuple(
        Record("forget", rows[n]["question"], rows[n]["answer"], str(n), {"nll": float(n)})
        for n in (1, 3)
    )
    made = Evaluation(some, MADE.estimates, {})
    suite = Suite(forget=[Row(r["question"], r["answer"]) for r in rows])
    cached("key", suite, lambda: made)
    assert cached("key", suite, lambda: None) == (made, True)


def test_a_key_is_of_how_the_model_and_its_tokenizer_work():
    suite = load_suite(ROWS)
    key = key_of(tiny.model(), tiny.tokenizer(), suite, {})
    model, tokenizer = tiny.model(), tiny.tokenizer()
    tokenizer("padded", padding="max_length", max_length=20, truncation=True)
    model.config._name_or_path = "elsewhere"
    assert key_of(model, tokenizer, suite, {}) == key
    model.config.rms_norm_eps = 0.5
    assert key_of(model, tokenizer, suite, {}) != key
    model = tiny.model()
    model.generation_config.suppress_tokens = [5]
    assert key_of(model, tokenizer, suite, {}) != key
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert key_of(tiny.model(), tokenizer, suite, {}) != key
