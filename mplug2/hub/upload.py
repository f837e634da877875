"""A folder of cards to the Hugging Face Hub: one commit, by the user's own token."""

from pathlib import Path
from typing import Any

from mplug2.errors import CardError
from mplug2.hub.download import OFFLINE, offline
from mplug2.hub.remote import split_hub


def upload(folder: Path, address: str) -> str:
    """Everything in `folder` to `hf://owner/name[@revision]`; the repository is made if it is not there.
    Returns the commit's page. Raises CardError that says what is missing, DownloadError for an address of
    another form."""
    repository, revision, path = split_hub(address)
    if offline():
        raise CardError(f"{OFFLINE} is set: nothing is published to {address}")
    import huggingface_hub  # a second of import, that only this costs

    if huggingface_hub.get_token() is None:
        raise CardError(
            f"publishing to {address} needs a token of the Hugging Face Hub: `hf auth login` keeps one, or "
            "set HF_TOKEN"
        )
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        done: Any = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            path_in_repo=path or None,
            revision=revision or None,
            commit_message="Modules and cards, by mplug2 publish",
        )
    except Exception as error:  # of HTTP, of the Hub, of the network: the library raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CardError(f"{address}: could not be published ({reason[:200]})") from None
    return str(getattr(done, "commit_url", done))
