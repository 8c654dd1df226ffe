"""A lock between processes; with the standard library only, so that the macOS check can import it without tqext."""

import contextlib
import fcntl


@contextlib.contextmanager
def locked(path):
    """One process at a time, among the workers of a test run and other runs."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
