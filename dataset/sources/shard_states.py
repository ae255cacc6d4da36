"""What changes with the content of very many shards, without a request for each of them.

A store is asked by one listing of each folder (1,000 files an answer), a disk by threads.
"""

from collections.abc import Sequence

from base.caches import digest, states_digest
from dataset.sources.remote import file_system, is_remote, state_in

MANY = 100  # shards of a folder from which on it is listed


def state_of_shards(files: Sequence[str]) -> str | None:
    """A digest of the states of files, missing ones among them, by path or URL.

    None where it would not change with every content: the store lists no folders (http://), or
    neither ETags nor times; or where a listing would cost more than asking for the files.
    """
    remote = [is_remote(file) for file in files]
    if not any(remote):
        return states_digest(files)
    states = _listed_states(files) if all(remote) else None
    return None if states is None else digest(states)


def _listed_states(files: Sequence[str]) -> list[tuple | None] | None:
    """The states of remote files; None where listings do not give them."""
    folders: dict[str, int] = {}
    for file in files:
        folder = file.rpartition("/")[0]
        folders[folder] = folders.get(folder, 0) + 1
    if min(folders.values()) < MANY:
        return None
    listed: dict[str, tuple] = {}
    for folder in folders:
        found = _listing(folder)
        if found is None:
            return None
        listed.update(found)
    return [listed.get(file) for file in files]


def _listing(folder: str) -> dict[str, tuple] | None:
    """URL -> state of the files of a remote folder; None where the store does not give them."""
    found = {}
    try:
        files, path = file_system(folder)
        for about in files.ls(path, detail=True):
            if about.get("type") == "directory":
                continue
            name = about["name"].rpartition("/")[2]
            state = state_in(about)
            if {*state[1:]} <= {"", "None"}:  # a size alone stays the same when a file is replaced
                return None
            found[f"{folder}/{name}"] = state
    except Exception:  # it forbids listing, or cannot: every storage service raises its own
        return None
    return found
