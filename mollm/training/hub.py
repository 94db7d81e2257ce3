"""A model and its card on the hub."""

from __future__ import annotations

import glob
from fnmatch import fnmatchcase
from pathlib import Path

from mollm.errors import UsageError
from mollm.system.parsing import reason_of

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_config.json")
"""What holds the weights of a repository, or is loaded in their place."""


def upload(
    folder: Path, repo_id: str, *, private: bool | None, token: str | None, commit_message: str
) -> str:
    """Uploads a folder in place of the weights that the repository has; returns where it is.

    The repository's history keeps what was there before.

    Raises:
        UsageError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        files = api.list_repo_files(made.repo_id)
        old = [name for name in files if any(fnmatchcase(name, each) for each in _WEIGHTS)]
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            delete_patterns=[glob.escape(name) for name in old if "/" not in name] or None,
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the model cannot be uploaded to {repo_id}: {reason_of(error)}: look at the name, the "
            "token and the network, and call push_to_hub again."
        ) from error
    return str(made)
