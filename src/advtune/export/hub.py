"""A written folder to the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from advtune.errors import UserError


def check_push(repo: str) -> None:
    """Raises UserError for a name that the hub does not take and when there is no token, before anything is written."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {reason(error)}") from None
    if repo.count("/") != 1:
        raise UserError(f"--push {repo}: give OWNER/NAME")
    if not get_token():
        raise UserError("--push: there is no Hugging Face token; log in with `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repo: str, private: bool) -> str:
    """Make the repository if there is none and upload the folder's files; the address of the repository.

    Raises UserError with the command that tries again; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from advtune")
    except Exception as error:  # the hub client raises many kinds; all mean that it is not there
        again = shlex.join(["hf", "upload", repo, str(folder)])
        raise UserError(
            f"{folder} is written, but not uploaded to {repo} ({reason(error)}); try again: {again}"
        ) from error
    return str(url)


def reason(error: Exception) -> str:
    """The first line of an error, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
