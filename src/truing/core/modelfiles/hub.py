"""What the Hugging Face hub says when it gives nothing, and what to do about it."""

from __future__ import annotations


def trouble(error: Exception, repository: str, revision: str = "") -> tuple[str, str]:
    """(what was said, in a line; how it can be mended) of an error of the hub's client.

    Args:
        error: that it raised.
        repository: "owner/name", or "datasets/owner/name".
        revision: that was asked for, "" for the newest.

    The second is "" for all but what the hub itself refuses, such as a network that is not there.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, OSError):
        error = error.__cause__  # nothing is in the cache either
    page = f"{constants.ENDPOINT}/{repository}"
    token = "to a token of that account (`hf auth login` keeps one)"
    if isinstance(error, GatedRepoError):  # which is one of a repository not found, too
        said = "it is gated: the hub gives it to accounts that were granted access"
        return said, f"Ask for access at {page}, then set HF_TOKEN {token}"
    if isinstance(error, RepositoryNotFoundError):
        said = "the hub has none of that name, or shows it to some accounts only"
        return said, f"Check the spelling; if an account of yours may see it, set HF_TOKEN {token}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}", f"{page} lists its branches, tags and commits"
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__, ""
