"""Upload a folder to the Hugging Face hub."""

from pathlib import Path

from base.errors import UserError, first_line
from base.hub import SECONDS, limit_silence

REFUSED = (401, 403)


def check_hub(repository: str) -> None:
    """UserError where the hub does not answer or does not take the token, before anything is
    converted. Whether it lets us write to `repository` shows only in `push`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = HfApi()
    try:
        hub.model_info(repository, timeout=SECONDS)
    except Exception as error:  # of the hub, its client, or the network
        new = isinstance(error, RepositoryNotFoundError) and error.response.status_code == 404
        if not new:
            raise UserError(_reason(error, repository, hub.endpoint)) from None


def push(folder: Path, repository: str, private: bool) -> str:
    """Create `repository` (USER/NAME) where it is not there, and upload every file of the folder in
    one commit; returns its address. UserError where the hub refuses or cannot be reached.

    The token is that of `hf auth login` or of HF_TOKEN; HF_ENDPOINT names another hub.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    limit_silence()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Upload {repository}"
        )
    except Exception as error:  # of the hub, its client, or the network
        reason = _reason(error, repository, hub.endpoint)
        raise UserError(f"{reason}; then `hf upload {repository} {folder}`") from None
    return f"{hub.endpoint}/{repository}"


def _reason(error: Exception, repository: str, endpoint: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    no_token = isinstance(error, UnicodeEncodeError)  # its characters fit no header
    if status in REFUSED or no_token:
        return (
            f"--push {repository}: {endpoint} refuses the token; log in with `hf auth login`, or set "
            f"HF_TOKEN to a token that may write to {repository.partition('/')[0]}"
        )
    if status is None and not isinstance(error, ValueError):
        return f"--push {repository}: {endpoint} cannot be reached ({first_line(error)})"
    return f"--push {repository}: {endpoint} does not take it ({first_line(error)})"
