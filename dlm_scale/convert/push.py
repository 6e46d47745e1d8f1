"""Uploading an export with the Hub's own client; who may do so is that client's business (`hf auth login`)."""

from __future__ import annotations

from pathlib import Path

from dlm_scale.errors import UsageError


def push_folder(folder: Path, repository: str) -> str:
    """Upload a folder to a repository, made private if it is new; returns its address. Raises UsageError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    client = HfApi()
    try:
        client.create_repo(repository, private=True, exist_ok=True)
        client.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UsageError(f"{folder} is complete, but could not be uploaded to {repository!r}: {error}") from error
    return f"{client.endpoint}/{repository}"
