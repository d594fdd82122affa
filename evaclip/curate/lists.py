"""The lists of links of a recipe: found in a folder, or fetched to it one by one.

From the Hugging Face Hub through its own client, which goes on after a break; from an https address through our own
`fetch`. The names of the lists and the commit that they are of are written down at the first look, in `lists.json`:
whoever goes on later, or in another task of a job array, goes on with the same lists.
"""

import fnmatch
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaclip.curate.recipe import Lists
from evaclip.errors import InputError
from evaclip.fetch import fetch

NAMES = "lists.json"
# Most bytes and seconds of one list that is fetched from an address.
MAX_BYTES, MAX_SECONDS = 64 << 30, 12 * 3600.0


@dataclass(frozen=True)
class Located:
    """The lists of a recipe, in their order, whether they are here yet or not."""

    folder: Path
    names: tuple[str, ...]
    """Paths below the folder."""
    revision: str = ""
    """Commit that they are of, if they come from the Hub."""


def lists_in(lists: Lists, folder: Path) -> list[Path]:
    """The lists that lie in a folder. Raises InputError when there are none."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and _matches(path.relative_to(folder), lists))
    if not found:
        raise InputError(f"{folder} holds no lists of links ({lists.pattern}); put them there, or name their folder")
    return found


def located(lists: Lists, folder: Path, given: bool) -> Located:
    """Which lists there are. `given`: the user has named the folder, so they are those in it.

    Raises InputError, with what to do where the owner has to be asked.
    """
    if given or not (lists.hub or lists.addresses):
        return Located(folder, tuple(str(path.relative_to(folder)) for path in lists_in(lists, folder)))
    if lists.addresses:
        return Located(folder, tuple(url.rsplit("/", 1)[-1] for url in lists.addresses))
    known = folder / NAMES
    if known.exists():
        said = json.loads(known.read_text())
        if (said["hub"], said["asked"]) != (lists.hub, lists.revision):
            raise InputError(f"{folder} holds lists of {said['hub']} at {said['asked']}; choose another --out")
        return Located(folder, tuple(said["names"]), said["revision"])
    revision, names = _on_hub(lists)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = known.with_name(f"{NAMES}.{os.getpid()}")
    record = {"hub": lists.hub, "asked": lists.revision, "revision": revision, "names": names}
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(known)
    return Located(folder, tuple(names), revision)


def list_number(lists: Lists, where: Located, part: int) -> Path:
    """The list of a number, counted from 0, fetched first if it is not there. Raises InputError."""
    if not 0 <= part < len(where.names):
        raise InputError(f"list {part} is asked for, but there are {len(where.names)}, counted from 0")
    path = where.folder / where.names[part]
    if path.exists() and not where.revision:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if lists.addresses:
        fetch(lists.addresses[part], path, max_bytes=MAX_BYTES, seconds=MAX_SECONDS)
        return path
    return _from_hub(lists, where, where.names[part])


def _matches(path: Path, lists: Lists) -> bool:
    """Whether the whole path fits the pattern, or the name alone, as of lists that were put there by hand."""
    return fnmatch.fnmatch(str(path), lists.pattern) or fnmatch.fnmatch(path.name, Path(lists.pattern).name)


def _on_hub(lists: Lists) -> tuple[str, Sequence[str]]:
    """The commit that a revision stands for now, and the lists of it."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        revision = huggingface_hub.HfApi().dataset_info(lists.hub, revision=lists.revision).sha or lists.revision
        names = huggingface_hub.HfApi().list_repo_files(lists.hub, revision=revision, repo_type="dataset")
    except (HfHubHTTPError, OSError) as error:
        raise _refused(lists, error) from None
    found = sorted(name for name in names if fnmatch.fnmatch(name, lists.pattern))
    if not found:
        raise InputError(f"{lists.hub} holds no lists of links ({lists.pattern})")
    return revision, found


def _from_hub(lists: Lists, where: Located, name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = huggingface_hub.hf_hub_download(
            lists.hub, name, repo_type="dataset", revision=where.revision, local_dir=where.folder
        )
    except (HfHubHTTPError, OSError) as error:
        raise _refused(lists, error) from None
    return Path(path)


def _refused(lists: Lists, error: Exception) -> InputError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"https://huggingface.co/datasets/{lists.hub}"
    if isinstance(error, GatedRepoError):
        return InputError(f"{lists.hub} is handed out on request: accept its terms at {page}, then `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(f"{lists.hub} is not there, or not for you: look at {page}, and `hf auth login`")
    said = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(f"the lists of {lists.hub} could not be fetched: {said[0]}")
