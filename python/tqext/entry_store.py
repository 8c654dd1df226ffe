"""Entries on disk, found by their keys: bounded, least recently used first, shared by the processes of a machine.

Every entry is a file that says by itself what it is and holds its own checksums; docs/prefix_store.md has the bytes. An index
(SQLite) says which entries there are and when they were used. It can be made again from the files.

A file is there before its row in the index, and gone after it. So a process that is killed leaves at most a file without a row,
which the next process to open the store alone takes in, or removes if it is not whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import sqlite3
import stat
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

VERSION = 1
MAGIC = b"tqextpfx"
KEY_BYTES = 32
# magic; version, kind; key, parent, space; begin, tokens, bytes of the payload; checksums of the payload and of all before it
HEADER = struct.Struct("<8s2I32s32s32s3Q2I")
BLOCK_KIND, END_KIND = 0, 1
# Files that are read and checked at once.
READERS = max(1, min(4, os.cpu_count() or 1))
# Seconds that a process waits for another one that writes to the index.
BUSY_SECONDS = 5.0
_AT_ONCE = 500  # keys of one query

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    key BLOB PRIMARY KEY, parent BLOB NOT NULL, space BLOB NOT NULL, kind INTEGER NOT NULL, start INTEGER NOT NULL,
    n_tokens INTEGER NOT NULL, size INTEGER NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON entry (used, start DESC);
CREATE INDEX IF NOT EXISTS by_parent ON entry (parent) WHERE kind = 1;
CREATE TABLE IF NOT EXISTS total (id INTEGER PRIMARY KEY CHECK (id = 0), size INTEGER NOT NULL, n INTEGER NOT NULL);
INSERT OR IGNORE INTO total VALUES (0, 0, 0);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON entry
    BEGIN UPDATE total SET size = size + NEW.size, n = n + 1; END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON entry
    BEGIN UPDATE total SET size = size - OLD.size, n = n - 1; END;
"""
_INSERT = "INSERT OR IGNORE INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


class Entry(NamedTuple):
    """What an entry is.

    Attributes:
        key: 32 bytes.
        parent: The key of the entry before it.
        space: What its bytes mean: a model and how it is compressed.
        kind: `BLOCK_KIND` or `END_KIND`.
        start: Tokens before it. ``n_tokens``: its own.
    """

    key: bytes
    parent: bytes
    space: bytes
    kind: int
    start: int
    n_tokens: int


class DamagedError(ValueError):
    """A file that is not an entry, or not the whole of one."""


def pack(entry: Entry, payload: Sequence[bytes | memoryview]) -> bytes:
    """The header of an entry's file, which the parts of the payload follow."""
    size, check = 0, 0
    for part in payload:
        size += len(part)
        check = zlib.crc32(part, check)
    head = HEADER.pack(
        MAGIC, VERSION, entry.kind, entry.key, entry.parent, entry.space, entry.start, entry.n_tokens, size, check, 0
    )[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def unpack_header(head: bytes | memoryview) -> tuple[Entry, int, int]:
    """The entry, the bytes of its payload and their checksum.

    Raises:
        DamagedError: It is not a header of this version, or is damaged.
    """
    if len(head) < HEADER.size:
        raise DamagedError("it ends within its header")
    magic, version, kind, key, parent, space, start, n_tokens, size, check, own = HEADER.unpack(head[: HEADER.size])
    if magic != MAGIC or version != VERSION or own != zlib.crc32(head[: HEADER.size - 4]):
        raise DamagedError("its header is damaged")
    return Entry(key, parent, space, kind, start, n_tokens), size, check


class EntryStore:
    """The entries of a folder.

    Args:
        folder: Made if it is not there, for its owner alone.
        max_bytes: Of all files of entries together; a file that is just being written comes on top. The index takes some
            hundred bytes for each entry besides.

    Attributes:
        counts: `COUNTERS` of this process.

    Raises:
        ValueError: The folder is another user's, or its index is damaged while another process uses it.
    """

    COUNTERS = ("read_bytes", "written_bytes", "evicted", "damaged", "errors")

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.counts = dict.fromkeys(self.COUNTERS, 0)
        self._count_lock = threading.Lock()
        self._read_lock, self._write_lock = threading.Lock(), threading.Lock()
        self._connections: list[sqlite3.Connection] = []
        self._numbers = itertools.count()
        self._home = _private(folder, f"v{VERSION}")
        self._new = _private(self._home, "new")
        self._index = self._home / "index.sqlite"
        self._lock = os.open(self._home / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._readers = ThreadPoolExecutor(READERS, "tqext-prefix-read")
        try:
            if _locked(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._repair()
            _locked(self._lock, fcntl.LOCK_SH)
            self._open_index()
        except sqlite3.DatabaseError as error:
            self.close()
            raise ValueError(
                f"[PrefixStore] path: expected a store, got a damaged index ({error}) that another process uses; it is made "
                "again when that one has ended"
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the files back; the store cannot be used any more."""
        self._readers.shutdown()
        self._close_index()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # Index

    def _connect(self) -> sqlite3.Connection:
        os.close(os.open(self._index, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # SQLite's own would be readable
        connection = sqlite3.connect(self._index, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._connections.append(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(_SCHEMA)
        return connection

    def _open_index(self) -> None:
        """One connection to read, which waits for no transaction, and one to write."""
        self._close_index()
        self._reading, self._writing = self._connect(), self._connect()

    def _close_index(self) -> None:
        while self._connections:
            self._connections.pop().close()

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        with self._read_lock:
            return self._reading.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._write_lock:
            connection = self._writing
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A store that fails costs time and no answer: what went wrong is counted and said once."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if self.counts["errors"] == 0:
                logging.warning(f"prefix store: {type(error).__name__}: {error}; further errors are only counted")
            self.count("errors")

    def count(self, name: str, n: int = 1) -> None:
        with self._count_lock:
            self.counts[name] += n

    def totals(self) -> tuple[int, int]:
        """Bytes and number of all entries, of every process."""
        with self._tolerant():
            ((size, n),) = self._rows("SELECT size, n FROM total")
            return int(size), int(n)
        return 0, 0

    def known(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys that have an entry."""
        found: set[bytes] = set()
        with self._tolerant():
            for some in _chunks(keys):
                marks = ",".join("?" * len(some))
                found.update(key for (key,) in self._rows(f"SELECT key FROM entry WHERE key IN ({marks})", some))
        return found

    def ends(self, parents: Sequence[bytes]) -> list[tuple[bytes, bytes, int]]:
        """Key, parent and tokens of the ends that follow these entries."""
        found: list[tuple[bytes, bytes, int]] = []
        with self._tolerant():
            for some in _chunks(parents):
                marks = ",".join("?" * len(some))
                query = f"SELECT key, parent, n_tokens FROM entry WHERE kind = {END_KIND} AND parent IN ({marks})"
                found += self._rows(query, some)
        return found

    def touch(self, keys: Iterable[bytes], stamp: int) -> None:
        """These entries were used just now."""
        with self._tolerant(), self._transaction() as connection:
            connection.executemany("UPDATE entry SET used = ? WHERE key = ?", [(stamp, key) for key in keys])

    def discard(self, keys: Sequence[bytes]) -> None:
        """Drop entries whose contents are of no use."""
        self.count("damaged", len(keys))
        self._drop(keys)

    def _drop(self, keys: Iterable[bytes]) -> None:
        keys = list(keys)
        with self._tolerant():
            with self._transaction() as connection:
                connection.executemany("DELETE FROM entry WHERE key = ?", [(key,) for key in keys])
            self._unlink(keys)

    def _unlink(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def _evict(self, connection: sqlite3.Connection, stamp: int) -> list[bytes] | None:
        """Delete rows until the bound holds, those of the latest use never: None if that is not enough."""
        victims: list[bytes] = []
        while connection.execute("SELECT size FROM total").fetchone()[0] > self.max_bytes:
            # Of entries that were used together the last ones first: without what comes before them they cannot be found.
            query = "SELECT key FROM entry WHERE used < ? ORDER BY used, start DESC LIMIT 1"
            row = connection.execute(query, (stamp,)).fetchone()
            if row is None:
                return None
            connection.execute("DELETE FROM entry WHERE key = ?", row)
            victims += row
        return victims

    # Files

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._home / name[:2] / name

    def write(self, entry: Entry, payload: Sequence[bytes | memoryview], stamp: int) -> bool:
        """Store an entry, and remove those that were used the longest ago until there is room for it.

        Args:
            entry: What it is.
            payload: Its bytes, in parts.
            stamp: When it is used, `now`. Entries of this time and later stay.

        Returns:
            Whether it is stored: there is no room for it, or the disk did not take it.
        """
        size = HEADER.size + sum(map(len, payload))
        if size > self.max_bytes:
            return False
        with self._tolerant():
            self._write_file(entry, payload)
            victims = None
            try:
                with self._transaction() as connection:
                    connection.execute(_INSERT, (*entry, size, stamp))
                    victims = self._evict(connection, stamp)
                    if victims is None:
                        raise _NoRoom
            except _NoRoom:
                if not self.known([entry.key]):
                    self._unlink([entry.key])
                return False
            self._unlink(victims or [])
            self.count("evicted", len(victims or []))
            self.count("written_bytes", size)
            return True
        return False

    def _write_file(self, entry: Entry, payload: Sequence[bytes | memoryview]) -> None:
        path = self._path(entry.key)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        new = self._new / f"{os.getpid()}-{threading.get_ident()}-{next(self._numbers)}"
        try:
            with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(pack(entry, payload))
                for part in payload:
                    file.write(part)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)

    def read(self, keys: Sequence[bytes]) -> Iterator[memoryview]:
        """The payloads of the entries up to the first that is missing or damaged; that one is dropped."""
        for some in _chunks(keys, 4 * READERS):
            for key, payload in zip(some, self._readers.map(self._read_file, some), strict=True):
                if payload is None:
                    self._drop([key])
                    return
                yield payload

    def _read_file(self, key: bytes) -> memoryview | None:
        try:
            content = memoryview(self._path(key).read_bytes())
            entry, size, check = unpack_header(content)
            payload = content[HEADER.size :]
            if entry.key != key or len(payload) != size or zlib.crc32(payload) != check:
                raise DamagedError("its bytes are others")
        except FileNotFoundError:  # removed for others meanwhile, by another process
            return None
        except OSError:
            self.count("errors")
            return None
        except DamagedError:
            self.count("damaged")
            return None
        self.count("read_bytes", len(content))
        return payload

    # Opening

    def _repair(self) -> None:
        """Make index and files fit each other; no other process uses them."""
        for left in self._new.iterdir():
            left.unlink()
        try:
            self._open_index()
            ok = self._rows("PRAGMA quick_check(1)") == [("ok",)]
        except sqlite3.DatabaseError:
            ok = False
        if not ok:
            self._forget_index()
        rows = {key for (key,) in self._rows("SELECT key FROM entry")}
        files = {bytes.fromhex(file.name): file for file in self._home.glob("??/*") if _is_name(file.name)}
        found = []
        for key in files.keys() - rows:
            try:
                with files[key].open("rb") as file:
                    entry, size, _ = unpack_header(file.read(HEADER.size))
                    status = os.fstat(file.fileno())
                if entry.key != key or status.st_size != HEADER.size + size:
                    raise DamagedError("its bytes are others")
                found.append((*entry, status.st_size, status.st_mtime_ns))
            except DamagedError:
                files[key].unlink()
                self.count("damaged")
        with self._transaction() as connection:
            connection.executemany(_INSERT, found)
            connection.executemany("DELETE FROM entry WHERE key = ?", [(key,) for key in rows - files.keys()])
            victims = self._evict(connection, now()) or []
        self._unlink(victims)
        self.count("evicted", len(victims))

    def _forget_index(self) -> None:
        logging.warning("prefix store: the index was damaged and is made again from the entries")
        self._close_index()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._index}{suffix}").unlink(missing_ok=True)
        self._open_index()


class _NoRoom(Exception):
    pass


def now() -> int:
    """The time of a use, in nanoseconds: one for all processes of a machine."""
    return time.time_ns()


def _chunks(keys: Sequence[bytes], n: int = _AT_ONCE) -> Iterator[Sequence[bytes]]:
    for i in range(0, len(keys), n):
        yield keys[i : i + n]


def _is_name(name: str) -> bool:
    return len(name) == 2 * KEY_BYTES and all(c in "0123456789abcdef" for c in name)


def _locked(file: int, how: int) -> bool:
    """Whether the file could be locked so; a file system without locks has one process at a time."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:
        return bool(how & fcntl.LOCK_EX)
    return True


def _private(parent: Path, name: str) -> Path:
    """A folder in another one that only its owner can enter."""
    folder = parent / name
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"[PrefixStore] path: expected a folder, or a place for one, got {parent}: {error.strerror}"
        ) from error
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise ValueError(f"[PrefixStore] path: expected a folder of this user, got {folder}, which is another's or no folder")
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder
