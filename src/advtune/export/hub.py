"""A written folder to the Hugging Face hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from advtune.errors import UserError

STATUS = {
    401: "the hub refuses the token: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: take one with write access to it",
    404: "the hub knows no such owner or repository, or the token may not see it",
}


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

    Raises UserError with the command that tries again, and for a public repository where a private one is wanted; the
    folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    failed = f"{folder} is written, but not uploaded to {repo}"
    try:
        with quiet():
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            public = private and api.repo_info(repo).private is False
            if not public:
                api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from advtune")
    except Exception as error:  # the hub client raises many kinds; all mean that it is not there
        again = shlex.join(["hf", "upload", repo, str(folder), *(["--private"] if private else [])])
        raise UserError(f"{failed} ({reason(error, api.endpoint)}); try again: {again}") from error
    if public:
        raise UserError(f"{failed}, which is there and public; make it private first, or leave out --private")
    return str(url)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the hub client's lines about every try of several; its errors come as exceptions."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def reason(error: Exception, endpoint: str = "") -> str:
    """What a refusal of the hub means, or the first line of an error with the address that was asked, or its kind."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in STATUS:
        return STATUS[status]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:200] if lines else type(error).__name__
    return f"{endpoint}: {text}" if endpoint and "://" not in text else text
