"""Upload files to a model repository of the Hugging Face hub, in one commit.

Names in the repository and their contents go in; the address of the commit comes out. The token is
huggingface_hub's own: the variable HF_TOKEN, or what `hf auth login` stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from rs_gguf.errors import InputError
from rs_gguf.models.sources import first_line, hub_resolves

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def check_repository(repository: str) -> None:
    """Raise `InputError` unless `repository` is `owner/name`."""
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r} is not a repository of the hub. Give owner/name.")


def upload(repository: str, contents: Mapping[str, Path | bytes], message: str) -> str:
    """Create the repository unless it exists, commit `contents` there and return the commit's address.

    Other files of the repository stay. A new repository is public.

    Raises:
        InputError: `repository` is not `owner/name`, the hub cannot be reached, or it refuses the files.
    """
    check_repository(repository)
    import huggingface_hub

    if not hub_resolves():
        raise InputError("the hub cannot be reached. Check the connection, then give the command again.")
    api = huggingface_hub.HfApi()
    additions = [
        huggingface_hub.CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
        for name, content in contents.items()
    ]
    try:
        api.create_repo(repository, exist_ok=True)
        commit = api.create_commit(repository, additions, commit_message=message)
    except Exception as error:  # The type depends on huggingface_hub's version and its HTTP client.
        raise InputError(
            f"cannot upload to {repository} ({first_line(error)}). Check the name, the connection and the "
            "token: `hf auth login`, or the variable HF_TOKEN."
        ) from error
    return str(commit.commit_url)
