"""Uploads to the Hugging Face Hub."""

from pathlib import Path

import huggingface_hub


def push(folder: Path, name: str) -> str:
    """Uploads a folder, as a private model unless `name` exists, and returns its URL.

    Raises:
      OSError: if the hub cannot be reached or refuses the upload.
    """
    hub = huggingface_hub.HfApi()
    try:
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # errors of the hub and of its HTTP library
        raise OSError(
            f"{folder} was written, but could not be uploaded to {name} ({type(error).__name__}: "
            f"{error}); log in with `hf auth login`, then run: hf upload {name} {folder}"
        ) from error
    return str(address)


def conclude(folder: Path, name: str | None) -> None:
    """Prints what is left to do with an exported folder, and uploads it if a name is given; raises
    as `push`."""
    print("README.md is the model card; fill in the licence")
    if name:
        print(f"uploaded to {push(folder, name)}")
