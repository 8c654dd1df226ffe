"""The cache folder, and folders in it that are made once, on first use: by one process, whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Of folders that are being made. Each holds a file that its maker has locked: the system unlocks it when the maker dies.
_SCRATCH = "tmp-"
_LOCK = "lock"


def cache_dir() -> Path:
    """The folder for converted models: ``$TQEXT_CACHE``, else the user's cache folder."""
    if override := os.environ.get("TQEXT_CACHE"):
        return Path(override)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tqext"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqext"


def make_once(folder: Path, make: Callable[[Path], None], *, done: str = "config.json") -> Path:
    """Make a folder unless it is there; another process that is making it is waited for.

    Args:
        folder: Its place.
        make: Makes the folder that it is given; whatever else it writes goes beside it, into the same scratch folder.
        done: A file that the folder holds when it is complete.

    Returns:
        The folder.
    """
    if (folder / done).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(folder) as scratch:
        if (folder / done).exists():  # another process has made it meanwhile
            return folder
        _sweep(folder.parent, scratch)
        made = scratch / "made"
        make(made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)  # in one step: a reader never sees half a model
    return folder


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """The empty scratch folder of a folder, for this process alone."""
    scratch = folder.with_name(_SCRATCH + folder.name)
    while True:
        scratch.mkdir(exist_ok=True)
        try:
            lock = (scratch / _LOCK).open("a")
        except FileNotFoundError:  # its last user has just removed it
            continue
        with lock:
            with contextlib.suppress(OSError):  # a file system without locks: two processes at once are not expected
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_at(lock.fileno(), scratch / _LOCK):
                continue
            try:
                for left in scratch.iterdir():  # of a maker that was killed
                    if left.name != _LOCK:
                        _remove(left)
                yield scratch
                return
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def _sweep(parent: Path, own: Path) -> None:
    """Remove the scratch folders of processes that were killed."""
    for scratch in parent.glob(f"{_SCRATCH}*"):
        if scratch == own:
            continue
        # Whatever goes wrong, it is not our folder that has it.
        with contextlib.suppress(OSError), (scratch / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock.fileno(), scratch / _LOCK):
                shutil.rmtree(scratch, ignore_errors=True)


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one of that path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
