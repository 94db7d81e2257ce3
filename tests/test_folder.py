import pytest

from mollm.errors import UsageError
from mollm.folder import staged


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_finished_run_fills_the_folder(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out) as stage:
        (stage / "model").mkdir()
        (stage / "model" / "weights").write_text("new")
        (stage / "summary.json").write_text("new")
        assert listing(out) != ["model", "summary.json"]
    assert listing(out) == ["model", "model/weights", "summary.json"]


def test_a_later_run_replaces_its_files_and_leaves_others(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "summary.json").write_text("old")
    with staged(tmp_path) as stage:
        (stage / "model").mkdir()
        (stage / "model" / "weights").write_text("new")
        (stage / "summary.json").write_text("new")
    assert listing(tmp_path) == ["model", "model/weights", "notes.txt", "summary.json"]
    assert (tmp_path / "summary.json").read_text() == "new"
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_run_loses_nothing(tmp_path, error):
    (tmp_path / "summary.json").write_text("old")
    with pytest.raises(error), staged(tmp_path) as stage:
        (stage / "summary.json").write_text("half")
        raise error
    assert listing(tmp_path) == ["summary.json"]
    assert (tmp_path / "summary.json").read_text() == "old"


def test_a_failed_first_run_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "a" / "b"):
        raise RuntimeError
    assert listing(tmp_path) == []


@pytest.mark.parametrize("inside", ["", "more/folders"])
def test_a_file_in_the_way_is_refused(tmp_path, inside):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(UsageError, match="out must be a folder that can be written"),
        staged(tmp_path / "file" / inside),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "mine"
