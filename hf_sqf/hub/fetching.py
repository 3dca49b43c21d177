"""Finds the folder that is meant by its path or by a repository's id on the Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from ..runtime.sqf_config import HUB_ID


def folder_of(folder_or_repo: str | Path, revision: str | None = None, token: bool | str | None = None) -> Path:
    """Return a folder as it is, and of a repository the folder in the local cache, to which it is downloaded.

    Args:
        folder_or_repo: a folder, or a repository's id on the Hub.
        revision: of the repository.
        token: of the Hub's user.

    Raises:
        FileNotFoundError: there is no such folder, and no such repository either, or the Hub cannot be reached.
    """
    folder = Path(folder_or_repo)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(str(folder_or_repo)):
        raise FileNotFoundError(f"there is no folder {folder_or_repo}, and a repository cannot be called that")
    try:
        return Path(snapshot_download(str(folder_or_repo), revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {folder_or_repo}, and a repository of that name is neither in the cache nor within "
            "reach"
        ) from error
