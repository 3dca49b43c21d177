"""Pushes a folder with a compressed model, once it has been looked through."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from ..runtime.sqf_config import SQFConfig
from .card import base_card_of, ours, package_version, write_card
from .checking import Unfaithful, judge
from .verification import verify

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

PUSH_OPTIONS = ("force", "original", "texts", "private", "revision", "commit_message", "commit_description",
                "create_pr", "tags")  # fmt: skip
"""What ``save_pretrained(push_to_hub=True)`` hands on."""


def push(
    folder: str | Path,
    repo_id: str,
    *,
    force: bool = False,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    tags: Iterable[str] = (),
) -> CommitInfo:
    """Push a folder that holds a compressed model to the Hub, in one commit.

    A push that fails part of the way leaves the repository as it was, and can be repeated.

    Args:
        folder: as ``save_pretrained`` has written it.
        repo_id: the repository; it is created where there is none.
        force: push even what the fidelity check on record refuses.
        private: whether a new repository is to be private.
        token: of the Hub's user; by default the one that is logged in.
        revision: branch; created where there is none.
        commit_message: by default "Upload model".
        commit_description: more about it.
        create_pr: open a pull request instead.
        tags: for the card, beside its own.

    Raises:
        Unfaithful: the check on record says that the model lies too far from its original.
        ValueError: the folder's files are damaged; see :func:`hf_sqf.hub.verify`.
    """
    folder = Path(folder)
    if faults := [fault for fault in verify(folder) if fault.fatal]:
        raise ValueError(f"{folder} is not fit to be pushed: " + "; ".join(map(str, faults)))
    model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = SQFConfig.from_dict(model_config["quantization_config"])
    if (reason := judge(config)) and not force:
        remedy = "give it more bits, loosen the limit in its SQFConfig, or force it"
        raise Unfaithful(f"not pushed: {reason}; {remedy}")
    api = HfApi(library_name="hf_sqf", library_version=package_version(), token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    keep_theirs = _renew_card(folder, config, repo_id, token, revision, tags)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=["README.md"] if keep_theirs else None,
    )


def _renew_card(
    folder: Path, config: SQFConfig, repo_id: str, token: bool | str | None, revision: str | None, tags: Iterable[str]
) -> bool:
    """Write the folder's card for this repository; return whether one stands there that must stay."""
    try:
        path = hf_hub_download(repo_id, "README.md", revision=revision, token=token)
        standing: str | None = Path(path).read_text(encoding="utf-8")
    except (EntryNotFoundError, RevisionNotFoundError):
        standing = None
    if standing is not None and not ours(standing):
        return True
    base_card = base_card_of(config.base_model) if config.base_model else None
    written = write_card(folder, repo_id, base_card)
    if written is not None and (more := list(tags)):
        card = ModelCard.load(written)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *more]))
        card.save(written)
    return False
