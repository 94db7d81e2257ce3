import json

import pytest
import tiny

pytest.importorskip("transformers")

from mollm import UsageError
from mollm.cli import main
from mollm.commands.settings_file import read_settings
from mollm.data.files import sample_path
from mollm.models import loading
from mollm.training import sweep as module
from mollm.training.sweep import Point, Sweep, sweep

FORGET = [{"question": f"Is it {n}?", "answer": f"{n}."} for n in range(4)]
RETAIN = [{"question": f"Was it {n}?", "answer": f"{n}!"} for n in range(20)]
DATA = {"forget": FORGET, "retain": RETAIN}


class FakeTrainer:
    """A run whose outcome is a curve: at 4e-4 it forgets nearly all and keeps nearly all."""

    made = ()

    def __init__(self, model, args, *, forget_dataset, retain_dataset, eval_dataset, peft_config):
        self.args = args
        self.stop_reason = None
        self.data = forget_dataset, retain_dataset, eval_dataset
        type(self).made += (self,)

    def look(self):
        return {"forget_probability": 0.8, "retain_probability": 0.5}

    def pop_callback(self, callback):
        assert callback.__name__ == "PrinterCallback"

    def train(self):
        rate, steps = self.args.learning_rate, self.args.max_steps
        if rate > 1e-2:
            self.stop_reason = "the kl loss must not grow"
        every = self.args.stop_when["steps"]
        looks = []
        for step in range(every, steps + 1, every):
            left = 1 / (1 + (rate * step / 1e-3))
            kept = 1 / (1 + (rate * step / 1e-1))
            looks.append(
                {"step": step, "stop_forget_probability": 0.8 * left,
                 "stop_retain_probability": 0.5 * kept}
            )  # fmt: skip
        self.state = type("State", (), {"log_history": [{"loss": 1.0}, *looks]})


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(module, "MOLLMTrainer", FakeTrainer)
    monkeypatch.setattr(module.gc, "collect", lambda: 0)  # of a model that such a run has not
    FakeTrainer.made = ()
    return FakeTrainer


def test_it_walks_up_and_refines_until_the_best_rate(fake):
    said = []
    found = sweep("m", DATA, {"learning_rate": 2e-5, "max_steps": 20}, minutes=9, say=said.append)
    rates = [made.args.learning_rate for made in fake.made if made.args.max_steps == 20]
    assert rates[:3] == [2e-5, 8e-5, 3.2e-4]
    ends = [p for p in found.points if p.is_end and p.steps == 20]
    ideal = max(_score(10 ** (k / 50) * 1e-5) for k in range(150))
    assert max(end.score for end in ends) > ideal - 0.01
    assert found.best.score >= max(end.score for end in ends)
    assert {made.args.max_steps for made in fake.made} == {10, 20, 40}
    assert len(rates) == len(set(rates))
    assert len(said) == len(fake.made)
    assert found.warning is None


def _score(rate, steps=20):
    forgotten, kept = 1 - 1 / (1 + rate * steps / 1e-3), 1 / (1 + rate * steps / 1e-1)
    return 2 * forgotten * kept / (forgotten + kept)


def test_a_rate_that_is_too_high_is_left_downwards(fake):
    found = sweep("m", DATA, {"learning_rate": 8e-3, "max_steps": 20}, minutes=9)
    assert found.best.learning_rate < 2e-3
    assert _score(found.best.learning_rate, found.best.steps) > 0.79


def test_a_part_of_what_is_kept_is_held_out(fake):
    found = sweep("m", DATA, {"learning_rate": 1e-4, "max_steps": 4}, minutes=9)
    forget, retain, looked_at = fake.made[0].data
    assert len(retain) == 16
    assert len(looked_at["retain"]) == 4
    assert not {r.prompt for r in retain} & {r.prompt for r in looked_at["retain"]}
    assert looked_at["forget"] == forget
    assert found.held_out == "4 retain rows that no run trained on"
    given = {**DATA, "eval_retain": FORGET, "eval_forget": RETAIN}
    sweep("m", given, {"learning_rate": 1e-4, "max_steps": 4}, minutes=9)
    assert len(fake.made[-1].data[1]) == 20
    assert [len(fake.made[-1].data[2][role]) for role in ("forget", "retain")] == [20, 4]
    few = sweep(
        "m", {**DATA, "retain": RETAIN[:5]}, {"learning_rate": 1e-4, "max_steps": 4}, minutes=9
    )
    assert few.held_out == "5 retain rows that are trained on"


def test_no_run_is_begun_that_would_end_too_late(fake, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    train = FakeTrainer.train

    def slow(self):
        now[0] += self.args.max_steps
        train(self)

    monkeypatch.setattr(FakeTrainer, "train", slow)
    found = sweep("m", DATA, {"learning_rate": 2e-5, "max_steps": 20}, minutes=1.1)
    assert len(fake.made) == 3
    assert found.seconds <= 66
    once = sweep("m", DATA, {"learning_rate": 2e-5, "max_steps": 20}, minutes=0.01)
    assert len(fake.made) == 4
    assert once.best.learning_rate == 2e-5


def test_runs_that_diverge_are_told_and_a_sweep_does_not_begin_with_one(fake):
    with pytest.raises(UsageError, match=r"but got 0\.5: give a smaller"):
        sweep("m", DATA, {"learning_rate": 0.5, "max_steps": 4}, minutes=9)
    found = sweep("m", DATA, {"learning_rate": 4e-3, "max_steps": 4}, minutes=9)
    assert found.failed[0][1] == "the kl loss must not grow"
    assert found.best.learning_rate <= 1e-2
    with pytest.raises(UsageError, match="minutes must be positive"):
        sweep("m", DATA, {"learning_rate": 1e-4, "max_steps": 4}, minutes=0)


def test_the_front_is_what_no_other_beats():
    points = [Point(1e-4, 4, s, f, k) for s, f, k in
              ((1, 0.1, 1.0), (2, 0.5, 0.9), (3, 0.4, 0.8), (4, 0.9, 0.2))]  # fmt: skip
    found = Sweep(tuple(points), (), "", 1.0)
    assert [point.step for point in found.front] == [1, 2, 4]
    assert found.best == points[3]
    assert Point(1e-4, 4, 4, 0.0, 0.0).score == 0


def test_the_command(tmp_path, capsys):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    out = tmp_path / "out/tuned.yaml"
    words = [
        *("tune", str(out), "--model", str(tmp_path / "tiny"), "--device", "cpu"),
        *("--forget", str(sample_path("authors-forget.jsonl"))),
        *("--retain", str(sample_path("authors-retain.jsonl"))),
        *("--set", "max_length=200", "--set", "per_device_train_batch_size=2"),
        *("--learning-rate", "1e-3", "--max-steps", "4", "--minutes", "0.001"),
    ]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["learning_rate"] == 1e-3
    assert "the best run forgot only" in found["warning"]  # of a model that knows nothing
    assert "# Mind: the best run" in out.read_text()
    assert [point["step"] for point in found["points"]] == [1, 2, 3, 4]
    settings = read_settings({"config": out})
    assert settings["learning_rate"] == 1e-3
    assert settings["max_steps"] == 4
    assert settings["max_length"] == 200
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("<circle") == 4
    assert str(tmp_path) not in page
    assert not list(tmp_path.glob("mollm-tune-*"))
    assert main([*words[:1], "x.txt", *words[2:]]) == 2
    assert "must go to a .yaml file" in capsys.readouterr().err


def test_a_model_that_forgets_nothing_ends_the_walk(fake, monkeypatch):
    monkeypatch.setattr(
        FakeTrainer,
        "train",
        lambda self: setattr(
            self,
            "state",
            type("State", (), {"log_history": [
                {"step": self.args.max_steps, "stop_forget_probability": 0.8,
                 "stop_retain_probability": 0.5}]}),
        ),
    )  # fmt: skip
    found = sweep("m", DATA, {"learning_rate": 2e-5, "max_steps": 20}, minutes=9)
    assert max(made.args.learning_rate for made in fake.made) <= 0.1
    assert found.best.forgotten == 0
    assert "forgot only 0.0%" in found.warning


def test_of_each_of_several_sets_a_part_is_held_out(fake):
    retain = {"legs": RETAIN[:10], "sums": RETAIN[10:]}
    data = {"forget": {"ada": FORGET[:2], "bob": FORGET[2:]}, "retain": retain}
    found = sweep("m", data, {"learning_rate": 1e-4, "max_steps": 4}, minutes=0.001)
    forget, kept, looked_at = fake.made[0].data
    assert {name: len(rows) for name, rows in forget.items()} == {"ada": 2, "bob": 2}
    assert {name: len(rows) for name, rows in kept.items()} == {"legs": 8, "sums": 8}
    assert {name: len(rows) for name, rows in looked_at.items()} == {
        "forget_ada": 2, "forget_bob": 2, "retain_legs": 2, "retain_sums": 2
    }  # fmt: skip
    assert found.held_out == "4 retain rows that no run trained on"
    retain = {"legs": RETAIN[:10], "sums": RETAIN[10:15]}
    few = sweep(
        "m", {**data, "retain": retain}, {"learning_rate": 1e-4, "max_steps": 4}, minutes=0.001
    )
    assert few.held_out == "7 retain rows of which 5 are trained on"


def test_the_rate_that_is_given_is_tried_as_it_is(fake):
    sweep("m", DATA, {"learning_rate": 1.234e-4, "max_steps": 4}, minutes=9)
    rates = [made.args.learning_rate for made in fake.made]
    assert rates[0] == 1.234e-4
    assert rates[1] == 4.9e-4


def test_a_sweep_has_steps(fake):
    with pytest.raises(UsageError, match="max_steps must be at least 1, but got 0"):
        sweep("m", DATA, {"learning_rate": 1e-4, "max_steps": 0}, minutes=1)


def test_settings_are_refused_as_a_run_refuses_them(tmp_path, capsys):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    words = ["tune", str(tmp_path / "tuned.yaml"), "--model", str(tmp_path / "tiny")]
    words += ["--forget", str(sample_path("authors-forget.jsonl"))]
    words += ["--retain", str(sample_path("authors-retain.jsonl"))]
    for more, message in (
        (["--device", "abacus"], "device must be cpu or cuda, but got 'abacus'"),
        (["--set", "lr_scheduler_type=none such"], "lr_scheduler_type must be one of linear, "),
        (["--set", "method=task-arithmetic"], "but got task-arithmetic, which turns the model"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_several_sets_are_tuned_from_the_command_line(tmp_path, capsys):
    loading.save(tiny.model(), tiny.tokenizer(), tmp_path / "tiny")
    lines = sample_path("authors-forget.jsonl").read_text().splitlines()
    for name, some in (("ada", lines[:6]), ("bob", lines[6:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
    words = [
        *("tune", str(tmp_path / "tuned.yaml"), "--model", str(tmp_path / "tiny")),
        *("--forget", f"{{ada: {tmp_path / 'ada.jsonl'}, bob: {tmp_path / 'bob.jsonl'}}}"),
        *("--retain", str(sample_path("authors-retain.jsonl")), "--device", "cpu"),
        *("--set", "max_length=200", "--set", "per_device_train_batch_size=2"),
        *("--learning-rate", "1e-3", "--max-steps", "1", "--minutes", "0.001", "--json"),
    ]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["learning_rate"] == 1e-3
