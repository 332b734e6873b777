"""Model packages on the Hugging Face Hub, through `huggingface_hub` (extra `affmae[hub]`).

The package's own settings apply: HF_ENDPOINT, HF_TOKEN, HF_HOME, `hf auth login`. Only model.json and the weights are
downloaded, to its cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from affmae_engine.errors import ConfigError, InputError, ResourceError, one_line
from affmae_engine.model_package import ABOUT, WEIGHTS, hub_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def download(path: Path) -> Path:
    """The folder in the local cache with the package `hf:ORG/NAME` or `hf:ORG/NAME@REVISION`.

    Raises:
        ConfigError: the name is written otherwise, or `huggingface_hub` is not installed.
        InputError: there is no such model, or access is not granted.
        ResourceError: the Hub cannot be reached and the model is not in the cache.
    """
    name, revision = hub_name(path)
    api = _api()
    with _translated(f"{path}"):
        return Path(api.snapshot_download(name, revision=revision, allow_patterns=[ABOUT, WEIGHTS]))


def upload(folder: Path, name: str, *, private: bool = False) -> str:
    """Publish a package's folder as ORG/NAME; a repository that exists gets a new commit. Returns its address.

    Raises:
        ConfigError: the name is not ORG/NAME, or `huggingface_hub` is not installed.
        InputError: not logged in, or without the right to write there.
        ResourceError: the Hub cannot be reached.
    """
    hub_name(Path(f"hf:{name}"))
    api = _api()
    with _translated(f"hf:{name}"):
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model package of affmae")
    return str(url)


def check_installed() -> None:
    """Raises ConfigError when `huggingface_hub` is missing."""
    _api()


def _api() -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError(
            "models on the Hugging Face Hub need huggingface_hub, which is not installed", 'pip install "affmae[hub]"'
        ) from error
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="affmae")


@contextmanager
def _translated(where: str) -> Iterator[None]:
    """Errors of the library as ours."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LocalEntryNotFoundError as error:
        raise ResourceError(f"{where} cannot be reached: {one_line(error)}", "check the network") from error
    except GatedRepoError as error:
        raise InputError(
            f"{where} asks for a login or for an agreement", "hf auth login, then accept it there"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise InputError(f"{where} was not found", "check the name; a private model needs hf auth login") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"{where} needs a login", "hf auth login") from error
    except HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        if refused:
            raise InputError(f"{where} refused the request", "hf auth login with a token that may do this") from error
        raise ResourceError(f"{where} cannot be reached: {one_line(error)}", "try again later") from error
    except OSError as error:
        raise ResourceError(f"{where} cannot be reached: {one_line(error)}", "check the network") from error
