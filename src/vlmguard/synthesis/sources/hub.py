"""The files of a data set on the hub, through its own client: one request for the list, then a file at a time.

What is fetched lies in the client's cache, so a second reading fetches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmguard.errors import ConfigError, missing_extra
from vlmguard.synthesis.sources.files import Files


def on_hub(repository: str, name: str, revision: str | None = None) -> Files:
    """The files of the data set `repository` (OWNER/NAME) at the commit that `revision` stands for now.

    Args:
        name: of its layout, for the remedy.

    Raises:
        ConfigError: it, or the revision, is not there; it is gated and access was not given; no connection.
        MissingExtra: the client is not installed.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ModuleNotFoundError as error:
        raise missing_extra("huggingface_hub", "synthesis") from error
    hub = HfApi()
    with _explained(repository, name, revision):
        told = hub.dataset_info(repository, revision=revision)
        if told.gated:
            hub.auth_check(repository, repo_type="dataset")
    names = tuple(sorted(one.rfilename for one in told.siblings or ()))
    known = frozenset(names)

    def fetch(file: str) -> Path | None:
        if file not in known:
            return None
        with _explained(repository, name, revision):
            return Path(hf_hub_download(repository, file, repo_type="dataset", revision=told.sha))

    licence = told.card_data.get("license") if told.card_data else None
    licence = ", ".join(map(str, licence)) if isinstance(licence, list) else licence
    return Files(repository, names, fetch, told.sha, licence, bool(told.gated))


@contextmanager
def _explained(repository: str, name: str, revision: str | None) -> Iterator[None]:
    """The client's errors as ours, with what to do."""
    from httpx2 import HTTPError  # which the client lets through where there is no connection
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/datasets/{repository}"
    copy = f"give a local copy as {name}:PATH"
    try:
        yield
    except GatedRepoError as error:
        remedy = f"Accept its terms on {page} and log in with `hf auth login`, or {copy}."
        raise ConfigError(f"{repository} is gated, and access to it was not given", remedy) from error
    except RepositoryNotFoundError as error:
        remedy = f"Look at {page}; log in with `hf auth login` if it is private or gated, or {copy}."
        raise ConfigError(f"the hub shows no data set {repository}", remedy) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{repository} has no revision {revision!r}", f"See {page}/commits/main.") from error
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"{repository} is on the hub, and HF_HUB_OFFLINE is set", f"Unset it, or {copy}.") from error
    except HfHubHTTPError as error:
        remedy = f"See {page}; a token may lack the right to read it (`hf auth login`). Or {copy}."
        raise ConfigError(f"the hub refused {repository}: HTTP {error.response.status_code}", remedy) from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        remedy = f"Check the connection, or {copy}."
        raise ConfigError(f"{repository} cannot be fetched from {constants.ENDPOINT}", remedy) from error
    except OSError as error:
        remedy = "Make room there, or set HF_HOME to another folder."
        raise ConfigError(
            f"{repository} cannot be kept in {constants.HF_HUB_CACHE}: {error.strerror}", remedy
        ) from error
