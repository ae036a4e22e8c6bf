"""The Hugging Face hub: is it there, does it have what is named, and which commit of it.

The one idea: a name is asked for once and with little patience before any library tries to download it, so that a
misspelt name or a machine without a network is told at once and in one line.
"""

from functools import cache

from limbeck.errors import LimbeckError

_PATIENCE = 10.0  # seconds


class HubError(LimbeckError):
    """The hub cannot be reached, or does not have what is asked for; the message says which, without a full stop."""


@cache
def commit_of(kind: str, name: str, revision: str | None = None) -> str:
    """The commit of a repository on the hub.

    Args:
        kind: model or dataset.
        name: its id.
        revision: a tag, branch or commit; default the newest.

    Raises:
        HubError: it is no hub id, there is no such repository, or the hub cannot be reached.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=_PATIENCE)
    except HFValidationError:
        raise HubError("it is no hub id either") from None
    except GatedRepoError:
        raise HubError(
            "the hub gives it only to whom it knows (accept its terms there, then `hf auth login`)"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(f"the hub has no such {kind}, or keeps it private (`hf auth login`)") from None
    except RevisionNotFoundError:
        raise HubError(f"the hub has it without a revision {revision}") from None
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise HubError(f"the hub cannot be reached ({type(error).__name__})") from None
    return str(info.sha)
