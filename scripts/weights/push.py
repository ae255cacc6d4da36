"""Upload a folder to the Hugging Face hub."""

from pathlib import Path

from base.errors import UserError, first_line

REFUSED = (401, 403)


def push(folder: Path, repository: str, private: bool) -> str:
    """Create `repository` (USER/NAME) where it is not there, and upload every file of the folder in
    one commit; returns its address. UserError where the hub refuses or cannot be reached.

    The token is that of `hf auth login` or of HF_TOKEN; HF_ENDPOINT names another hub.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Upload {repository}"
        )
    except Exception as error:  # of the hub, its client, or the network
        raise UserError(_reason(error, repository, hub.endpoint)) from None
    return f"{hub.endpoint}/{repository}"


def _reason(error: Exception, repository: str, endpoint: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in REFUSED or type(error).__name__ == "LocalTokenNotFoundError":
        return (
            f"--push {repository}: {endpoint} refuses the token; log in with `hf auth login`, or set "
            f"HF_TOKEN to a token that may write to {repository.partition('/')[0]}"
        )
    if status is None and not isinstance(error, ValueError):
        return f"--push {repository}: {endpoint} cannot be reached ({first_line(error)})"
    return f"--push {repository}: {endpoint} does not take it ({first_line(error)})"
