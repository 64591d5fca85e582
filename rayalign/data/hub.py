"""Datasets of the Hub, at one commit."""

from __future__ import annotations

from pathlib import Path

from rayalign.errors import UserError, first_line

SECONDS = 30.0


def hub_folder(name: str, revision: str | None) -> str:
    """Where the files of a dataset lie: an address that names a commit, or a copy of one on this machine.

    The copy serves where the Hub cannot be reached.

    Raises:
        UserError: the Hub has no such dataset or revision, or cannot be reached while there is no copy.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=SECONDS)
    except GatedRepoError as error:
        raise UserError(
            f"{name}: the dataset is gated; request access to it on the Hub, then log in with: hf auth login"
        ) from error
    except HFValidationError as error:
        raise UserError(f"{name}: there is no such file or folder here") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: there is no file or folder {Path(name).absolute()}, and the Hub shows you no dataset of that name"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name}: the dataset has no revision {revision!r}") from error
    except Exception as error:  # whatever the library of the day raises where there is no way to the Hub
        return str(_copy(name, revision, why=first_line(error).rstrip(".")))
    return f"hf://datasets/{info.id}@{info.sha}"


def _copy(name: str, revision: str | None, *, why: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    except Exception as error:
        raise UserError(
            f"{name}: there is no file or folder {Path(name).absolute()}, no copy of such a dataset on this machine, "
            f"and no way to the Hub ({why}); fetch it where there is one: hf download --repo-type dataset {name}"
        ) from error
