"""Fetching a model from the hub into its shared cache, with `huggingface_hub`.

The library itself obeys `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`, and resumes what was
broken off.
"""

from __future__ import annotations

import errno
import io
import re
from pathlib import Path
from typing import Any

from kuiperllm.checkpoint.base import Progress, brief
from kuiperllm.errors import DownloadError

WANTED = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "*.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
]
# Subfolders hold other forms of the same weights, and so does Mistral's consolidated.safetensors.
UNWANTED = ["*/*", "consolidated*", "adapter_*"]

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,95}"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_/-]|\.(?!\.)){0,250}", re.ASCII)


def download(repository: str, *, revision: str | None = None, progress: Progress | None = None) -> Path:
    """Fetch configuration, weights and tokenizer of a model, as far as the cache does not have them.

    Args:
        repository: OWNER/NAME.
        revision: branch, tag or commit; None: the main branch.
        progress: told of bytes as they arrive; None: nothing is shown.

    Returns:
        The folder that holds them.

    Raises:
        DownloadError: a name is malformed, or there is no network, no such model, no permission, no space.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise DownloadError(
            f"{brief(repository)} is no id of a model on the hub; ids have the form OWNER/NAME"
        )
    if revision is not None and not _REVISION.fullmatch(revision):
        raise DownloadError(f"{brief(revision)} is no name of a branch, tag or commit")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            tqdm_class=_reporter(repository, progress),
        )
    except Exception as error:
        # The library raises its own classes, those of its HTTP client (another one from version to version),
        # and OSError.
        raise DownloadError(f"{repository}: {_explain(error, revision)}") from error
    if not any(Path(folder).glob("*.safetensors")):
        raise DownloadError(
            f"{repository}: has no safetensors files; for GGUF, download one file and give its path"
        )
    return Path(folder)


def _explain(error: BaseException, revision: str | None) -> str:
    """What went wrong and what to do, in one line."""
    from huggingface_hub import errors

    causes = _causes(error)
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return "the disk is full; free some space, or set HF_HOME to a folder on another disk"
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return "is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
    status = {cause.response.status_code for cause in causes if getattr(cause, "response", None) is not None}
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes) or 403 in status:
        return "access is restricted; accept the terms on the model's page and set HF_TOKEN to your token"
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return f"has no branch, tag or commit {brief(revision)}"
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes) or 401 in status:
        return (
            "there is no such file or folder, nor such a model on the hub (for a private one, set HF_TOKEN)"
        )
    if status:
        return f"the hub answered with HTTP status {', '.join(map(str, sorted(status)))}; try again later"
    if any(isinstance(cause, errors.LocalEntryNotFoundError) for cause in causes):
        return "the hub cannot be reached; check the network (and HF_ENDPOINT, if it is set)"
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return f"could not be fetched: {type(error).__name__}: {brief(reason)}"


def _causes(error: BaseException) -> list[Any]:
    """An exception and those that led to it."""
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in causes:
        causes.append(current)
        current = current.__cause__ or current.__context__
    return causes


def _reporter(repository: str, progress: Progress | None) -> type[Any]:
    """A class for the library's progress bars that draws nothing and tells `progress` the bytes.

    Versions of the library differ in how many bars count bytes; the one that is ahead is reported.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    furthest = {"done": 0, "total": 0}

    class Reporter(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no watching thread

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})

        def display(self, *args: Any, **kwargs: Any) -> None:
            return None

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self.unit == "B" and progress is not None:
                furthest["done"] = max(furthest["done"], int(self.n))
                furthest["total"] = max(furthest["total"], int(self.total or 0), furthest["done"])
                progress(f"download {repository}", furthest["done"], furthest["total"])

    return Reporter
