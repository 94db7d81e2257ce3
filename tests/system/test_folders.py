import errno
import fcntl
import os

import pytest

from mollm.errors import UsageError
from mollm.system.folders import (
    check_new_file,
    check_space,
    check_writable,
    clear_unfinished,
    complete,
    locked,
    public_name,
    replace_text,
    staged,
    without_paths,
)


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


def test_a_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    replace_text(path, "one\n")
    replace_text(path, "two\n")
    assert path.read_text() == "two\n"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(UsageError, match=r"history\.jsonl cannot be written: no space left; free"):
        replace_text(path, "three\n")
    assert path.read_text() == "two\n"
    clear_unfinished(tmp_path)
    assert listing(tmp_path) == ["history.jsonl"]


def test_a_text_goes_where_a_link_leads_or_takes_its_place_and_keeps_the_permissions(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "run.yaml", tmp_path / "run.yaml"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    check_new_file(link)
    replace_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    replace_text(link, "apart", follow_link=False)
    assert not link.is_symlink()
    assert (target.read_text(), link.read_text()) == ("new", "apart")
    assert listing(tmp_path) == ["far", "far/run.yaml", "run.yaml"]


def test_a_pipe_stays_what_it_is(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "log"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    check_new_file(link)
    with pytest.raises(UsageError, match="log cannot be written"):  # nobody reads it
        replace_text(link, "one")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, pipe):
        replace_text(path, "one")
        assert os.read(reader, 100) == b"one"
    os.close(reader)
    replace_text(link, "apart", follow_link=False)
    assert link.read_text() == "apart"
    assert not link.is_symlink()
    assert pipe.is_fifo()


def test_a_file_that_cannot_be_written_has_the_name_that_it_would_get(tmp_path):
    (tmp_path / ".unfinished-x" / "metrics.json").mkdir(parents=True)
    with pytest.raises(UsageError) as refused:
        replace_text(tmp_path / ".unfinished-x" / "metrics.json", "{}")
    assert str(refused.value).startswith(f"{tmp_path}/metrics.json cannot be written: Is a direc")


@pytest.mark.parametrize("context", [staged, complete])
def test_what_was_written_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch, context):
    synced, moved = [], []

    def name_of(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    def move(source, target, do=os.rename):
        moved.append((os.path.basename(source), list(synced)))
        do(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(name_of(descriptor)))
    monkeypatch.setattr(os, "rename", move)
    monkeypatch.setattr(os, "replace", move)
    out = tmp_path / "out"
    with context(out) as stage:
        (stage / "model").mkdir()
        (stage / "model" / "weights").write_text("new")
        (stage / "summary.json").write_text("new")
    assert moved
    for _, before in moved:
        assert {"model", "weights", "summary.json"} <= set(before)
    assert synced[-1] == (out if context is staged else tmp_path).name


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


def test_a_complete_folder_appears_at_once_and_replaces_its_forerunner(tmp_path):
    folder = tmp_path / "deep" / "checkpoint"
    with complete(folder) as stage:
        (stage / "weights").write_text("new")
        assert not folder.exists()
    assert listing(tmp_path) == ["deep", "deep/checkpoint", "deep/checkpoint/weights"]
    with complete(folder) as stage:
        (stage / "more").write_text("newer")
    assert listing(folder) == ["more"]
    with pytest.raises(RuntimeError), complete(folder) as stage:
        (stage / "weights").write_text("half")
        raise RuntimeError
    assert listing(tmp_path) == ["deep", "deep/checkpoint", "deep/checkpoint/more"]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / ".unfinished-abc" / "checkpoint").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    clear_unfinished(tmp_path)
    assert listing(tmp_path) == ["mine"]


def test_a_locked_folder_lets_nobody_else_in(tmp_path):
    out = tmp_path / "out"
    with locked(out):
        with pytest.raises(UsageError, match="a folder of no other run"), locked(out):
            pytest.fail("the block must not run")
        assert out.is_dir()
    assert not out.exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can be written"), locked(tmp_path / "file"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_where_a_file_system_has_no_locks_a_run_goes_on_without(tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with staged(tmp_path / "out") as stage:
        (stage / "weights").touch()
    assert listing(tmp_path / "out") == ["weights"]
    code = errno.EIO
    with pytest.raises(UsageError, match="out must be a folder that can be written, but got"):
        locked(tmp_path / "out").__enter__()


def test_two_that_write_to_one_folder_do_not_meet_at_the_end(tmp_path):
    with staged(tmp_path) as stage:
        (stage / "first").touch()
        with pytest.raises(UsageError, match="a folder of no other run"), staged(tmp_path):
            pytest.fail("the block must not run")
    assert listing(tmp_path) == ["first"]


def test_a_folder_that_can_be_written_is_tried_and_left_as_it_was(tmp_path):
    check_writable(tmp_path / "deep" / "out")
    assert listing(tmp_path) == []
    check_space(tmp_path / "not there yet", 1, "the model")
    with pytest.raises(UsageError, match=r"the model take about 931.* GiB, but only .* are free"):
        check_space(tmp_path, 10**21, "the model")


@pytest.mark.parametrize("name", ["/proc/x", "x" * 300, "a\0b"])
@pytest.mark.parametrize("use", [check_writable, lambda out: locked(out).__enter__()])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, name, use):
    with pytest.raises(UsageError, match="out must be a folder that can be written, but got"):
        use(tmp_path / name)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["x" * 300 + ".yaml", "file/run.yaml", "folder"])
def test_a_file_that_cannot_be_written_is_found_out_before_it_is(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    before = listing(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be written: .*: name another file"):
        check_new_file(tmp_path / name)
    assert listing(tmp_path) == before
    check_new_file(tmp_path / "new" / "run.yaml")
    assert listing(tmp_path) == sorted([*before, "new"])


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: (os error 28)")]
)
def test_a_disk_that_is_full_is_one_sentence_and_leaves_what_was_there(tmp_path, error):
    with complete(tmp_path / "last") as stage:
        (stage / "weights").write_text("good")
    with (
        pytest.raises(UsageError, match=r"last cannot be written: .*from the last checkpoint"),
        complete(tmp_path / "last") as stage,
    ):
        (stage / "weights").write_text("half")
        raise error
    assert listing(tmp_path) == ["last", "last/weights"]
    assert (tmp_path / "last" / "weights").read_text() == "good"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("owner/model", "owner/model"),
        ("/home/ada/my model/", "my model"),
        ("~/data/x.jsonl", "x.jsonl"),
        ("runs/today/model", "model"),
        ("C:\\Users\\ada\\model", "model"),
        ("/", "a local folder"),
    ],
)
def test_a_name_for_others_has_no_folders(name, told):
    assert public_name(name) == told


def test_files_have_the_permissions_that_the_user_gives_to_others(tmp_path):
    before = os.umask(0o027)
    try:
        with complete(tmp_path / "new") as folder:
            (folder / "inner").mkdir(mode=0o700)
            for path in (folder / "a", folder / "inner" / "b"):
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "new").rglob("*")}
    assert modes == {"a": 0o640, "inner": 0o750, "b": 0o640}


def test_of_a_path_in_words_nothing_but_its_last_part_is_left(tmp_path):
    deep = tmp_path / "ada lovelace's" / "my data, 2"
    deep.mkdir(parents=True)
    (deep / "rows (1).jsonl").write_text("")
    for text, left in (
        (f"Rows of {deep}/rows (1).jsonl are read.", "Rows of rows (1).jsonl are read."),
        (f"{deep}/new.jsonl must be there.", "new.jsonl must be there."),
        (f"file://{deep}, and more", "my data, 2, and more"),
        ("at:/home/ada/x.jsonl", "at:x.jsonl"),
        ("see file:///home/ada/x.jsonl.", "see x.jsonl."),
        ("~ada/deep/x.jsonl", "x.jsonl"),
        ("--out=/home/ada --x", "--out=a local folder --x"),
        ("http://a.example/b/c stays, and yes/no/maybe", None),
        ("a / b / c", None),
    ):
        assert without_paths(text) == (text if left is None else left)


@pytest.mark.parametrize("name", ["/home/ada", "/home/ada/", "/Users/ada", "/root", "~", "~ada"])
def test_a_home_is_not_named_after_its_user(name):
    assert public_name(name) == "a local folder"
    assert public_name("/home/ada/model") == public_name("~ada/model") == "model"
