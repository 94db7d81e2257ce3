from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from mollm.data.files import read_table
from mollm.errors import UsageError

ROWS = [{"prompt": "How many?", "answer": "42"}]
SHA = "0123456789abcdef0123456789abcdef01234567"


class Builder:
    """Stands for a builder of `datasets`, which has looked at a repository but loaded nothing."""

    def __init__(self, *files):
        self.config = SimpleNamespace(data_files={"train": list(files)} if files else None)
        self.prepared = False

    def download_and_prepare(self):
        self.prepared = True

    def as_dataset(self, split):
        assert self.prepared
        self.split = split
        return datasets.Dataset.from_list(ROWS)


Builder.__module__ = "datasets.packaged_modules.json.json"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of which the test says which cards a repository has and which files they lead to."""

    class Hub:
        def __init__(self):
            self.cards, self.asked, self.looked, self.builder = {}, [], [], Builder()

        def download(self, name, file, *, repo_type, revision):
            self.looked.append((name, file, repo_type, revision))
            if file not in self.cards:
                raise LocalEntryNotFoundError("not there")
            path = tmp_path / SHA / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(self.cards[file])
            return str(path)

        def load(self, name, config, *, revision):
            self.asked.append((name, config, revision))
            if isinstance(self.builder, Exception):
                raise self.builder
            return self.builder

    made = Hub()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(datasets, "load_dataset_builder", made.load)
    return made


def card(files):
    return (
        f"---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n# Text\n"
    )


def test_the_hub_is_asked_for_config_and_split(hub):
    table = read_table("somebody/set", config="forget10", split="test")
    assert hub.asked == [("somebody/set", "forget10", None)]
    assert table.name == "somebody/set forget10 test"
    assert hub.builder.split == "test"
    assert [dict(row) for _, row in table.rows] == ROWS
    read_table("somebody/set")
    assert hub.builder.split == "train"


def test_a_repository_that_names_its_own_files_is_read_at_the_commit_looked_at(hub):
    hub.cards["README.md"] = card("[{split: train, path: 'data/*.json'}]")
    hub.builder = Builder(f"hf://datasets/somebody/set@{SHA}/data/a.json")
    read_table("somebody/set")
    assert hub.asked == [("somebody/set", None, SHA)]
    assert hub.looked[1] == ("somebody/set", ".huggingface.yaml", "dataset", SHA)


@pytest.mark.parametrize(
    "files",
    [
        "http://127.0.0.1/x.jsonl",
        "[{split: train, path: ['a.json', 'https://example.org/x.json']}]",
        "{train: ../x.json}",
        "/etc/passwd",
        "zip://a.json::https://example.org/x.zip",
        "hf://datasets/other/set/x.json",
    ],
)
@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
def test_a_repository_that_names_files_elsewhere_is_refused_before_any_is_asked_for(
    hub, file, files
):
    hub.cards[file] = card(files) if file == "README.md" else card(files).split("---")[1]
    with pytest.raises(
        UsageError, match=f"set somebody/set must name files of its own, but its {file}"
    ):
        read_table("somebody/set")
    assert hub.asked == []


def test_files_that_turn_out_to_be_elsewhere_are_not_loaded(hub):
    hub.builder = Builder("hf://datasets/somebody/set@1/a.json", "https://example.org/x.json")
    with pytest.raises(UsageError, match=r"files of its own, but it names https://example\.org"):
        read_table("somebody/set")
    assert not hub.builder.prepared


def test_a_kind_of_files_that_are_not_rows_is_refused(hub, monkeypatch):
    monkeypatch.setattr(Builder, "__module__", "datasets.packaged_modules.webdataset.webdataset")
    with pytest.raises(UsageError, match="but it is of the kind webdataset"):
        read_table("somebody/set")
    assert not hub.builder.prepared


def test_a_card_that_multiplies_itself_is_read_in_no_time(hub):
    lines = ["a0: &a0 [x.json, x.json]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    text = "\n".join([*lines, "configs:", "- data_files: *a29"])
    hub.cards["README.md"] = f"---\n{text}\n---\n"
    read_table("somebody/set")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (datasets.exceptions.DatasetNotFoundError("It is not there."), "It is not there"),
        (ConnectionError("no network"), "no network"),
        (ValueError("Config name is missing.\nPick one."), r"Config name is missing\. Pick one"),
        (EntryNotFoundError("nothing"), "nothing"),
        (StopIteration(), "StopIteration"),
    ],
)
def test_what_the_hub_refuses_is_told_with_its_reason(hub, error, words):
    hub.builder = error
    with pytest.raises(
        UsageError, match=f"data set somebody/set train cannot be loaded: {words}\\.$"
    ):
        read_table("somebody/set")
