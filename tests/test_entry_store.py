"""Entries on disk: kills, damage, bounds, several processes, and the bytes of a file."""

import hashlib
import os
import random
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib

import pytest

from tqext import entry_store
from tqext.entry_store import BLOCK_KIND, END_KIND, HEADER, Entry, EntryStore, now

SPACE = b"s" * 32


def key(i):
    return hashlib.sha256(b"%d" % i).digest()


def entry(i):
    return Entry(key(i), key(i - 1), SPACE, BLOCK_KIND, 64 * i, 64)


def content(i, size=5000):
    """Bytes that belong to one entry alone."""
    return (b"%08d" % i) * (size // 8)


def put(store, i, stamp=None, size=5000):
    return store.write(entry(i), [content(i, size)[:100], content(i, size)[100:]], now() if stamp is None else stamp)


def held(store, indexes):
    return {i for i in indexes if key(i) in store.known([key(i)])}


def files(folder):
    return sorted(p for p in (folder / "v1").glob("??/*"))


@pytest.fixture
def store(tmp_path):
    store = EntryStore(tmp_path / "store", 1 << 20)
    yield store
    store.close()


def test_entries_are_read_as_they_were_written(store, tmp_path):
    for i in range(20):
        assert put(store, i)
    assert [bytes(x) for x in store.read([key(i) for i in range(20)])] == [content(i) for i in range(20)]
    assert store.totals() == (20 * (HEADER.size + 5000), 20)
    store.close()
    again = EntryStore(tmp_path / "store", 1 << 20)
    assert [bytes(x) for x in again.read([key(i) for i in range(20)])] == [content(i) for i in range(20)]
    assert again.totals() == (20 * (HEADER.size + 5000), 20)
    again.close()


def test_the_bytes_of_a_file_are_the_documented_ones(store, tmp_path):
    """As docs/prefix_store.md says, by hand."""
    put(store, 7)
    (path,) = files(tmp_path / "store")
    got = path.read_bytes()
    assert path.parent.name + "/" + path.name == f"{key(7).hex()[:2]}/{key(7).hex()}"
    assert got[:8] == b"tqextpfx" and got[8:16] == b"\x01\0\0\0\0\0\0\0"
    assert got[16:48] == key(7) and got[48:80] == key(6) and got[80:112] == SPACE
    assert struct.unpack("<QQQ", got[112:136]) == (448, 64, 5000)
    assert struct.unpack("<I", got[136:140])[0] == zlib.crc32(content(7))
    assert struct.unpack("<I", got[140:144])[0] == zlib.crc32(got[:140])
    assert got[144:] == content(7) and HEADER.size == 144


@pytest.mark.parametrize("kind", ["flip", "cut", "longer", "empty", "other"])
def test_damaged_entries_are_dropped_with_what_was_to_come(store, tmp_path, kind):
    rng = random.Random(kind)
    for i in range(6):
        put(store, i)
    by_key = {p.name: p for p in files(tmp_path / "store")}
    path = by_key[key(3).hex()]
    whole = path.read_bytes()
    changed = bytearray(whole)
    if kind == "flip":
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[rng.randrange(1, len(changed)) :]
    elif kind == "longer":
        changed += b"x"
    elif kind == "empty":
        changed.clear()
    else:  # a whole entry, of another key
        changed[:] = by_key[key(4).hex()].read_bytes()
    path.write_bytes(changed)
    assert [bytes(x) for x in store.read([key(i) for i in range(6)])] == [content(i) for i in range(3)]
    assert held(store, range(6)) == {0, 1, 2, 4, 5} and not path.exists()
    assert store.counts["damaged"] == 1
    put(store, 3)
    assert len(list(store.read([key(i) for i in range(6)]))) == 6


def test_every_flipped_bit_of_a_header_is_seen(store, tmp_path):
    put(store, 1, size=8)
    (path,) = files(tmp_path / "store")
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert store._read_file(key(1)) is None, bit
    path.write_bytes(whole)
    assert bytes(store._read_file(key(1))) == content(1, 8)


def test_the_bound_holds_and_the_least_recently_used_go_first(tmp_path):
    size = HEADER.size + 5000
    store = EntryStore(tmp_path / "s", 10 * size)
    for i in range(10):
        assert put(store, i, stamp=i)
    store.touch([key(0), key(1)], 50)
    for i in range(10, 14):
        assert put(store, i, stamp=60 + i)
        assert store.totals()[0] <= 10 * size
    assert held(store, range(14)) == {0, 1, 6, 7, 8, 9, 10, 11, 12, 13}
    assert len(files(tmp_path / "s")) == 10 and store.counts["evicted"] == 4
    store.close()
    smaller = EntryStore(tmp_path / "s", 3 * size)
    assert held(smaller, range(14)) == {11, 12, 13} and len(files(tmp_path / "s")) == 3
    smaller.close()


def test_of_a_prompt_the_end_goes_first_and_a_prompt_does_not_push_itself_out(tmp_path):
    size = HEADER.size + 5000
    store = EntryStore(tmp_path / "s", 5 * size)
    for i in range(4):
        put(store, i, stamp=1)
    for i in range(100, 103):
        assert put(store, i, stamp=2)
    assert held(store, range(4)) == {0, 1}
    assert [put(store, i, stamp=3) for i in range(200, 208)] == [True] * 5 + [False] * 3
    assert held(store, [*range(4), *range(100, 103), *range(200, 208)]) == set(range(200, 205))
    assert store.totals()[0] == 5 * size and len(files(tmp_path / "s")) == 5
    assert not put(store, 300, size=1 << 20)
    store.close()


def test_everything_is_its_owners_alone(store, tmp_path):
    before = os.umask(0)
    try:
        store.close()
        wide = tmp_path / "wide"
        wide.mkdir(mode=0o777)
        other = EntryStore(wide, 1 << 20)
        put(other, 1)
        for path in (wide / "v1").rglob("*"):
            assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        assert {p.name for p in (wide / "v1").iterdir()} >= {"index.sqlite", "index.sqlite-wal", "lock", "new"}
        assert stat.S_IMODE((wide / "v1").stat().st_mode) == 0o700
        (wide / "v1").chmod(0o755)
        other.close()
        EntryStore(wide, 1 << 20).close()
        assert stat.S_IMODE((wide / "v1").stat().st_mode) == 0o700
        new = tmp_path / "a" / "new"
        EntryStore(new, 1 << 20).close()
        assert stat.S_IMODE(new.stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_a_folder_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "v1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"\[PrefixStore\] path: expected a folder of this user"):
        EntryStore(tmp_path / "s", 1 << 20)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("kind", ["gone", "no database", "page", "rows"])
def test_an_index_is_made_again_from_the_entries(tmp_path, kind):
    store = EntryStore(tmp_path / "s", 1 << 20)
    for i in range(40):
        put(store, i)
    store.close()
    index = tmp_path / "s" / "v1" / "index.sqlite"
    if kind == "gone":
        index.unlink()
    elif kind == "no database":
        index.write_bytes(b"no database" * 1000)
    elif kind == "page":
        changed = bytearray(index.read_bytes())
        changed[4096:] = b"\xa5" * (len(changed) - 4096)
        index.write_bytes(changed)
    else:
        connection = sqlite3.connect(index)
        connection.execute("DELETE FROM entry WHERE start < 1000")
        connection.commit()
        connection.close()
    again = EntryStore(tmp_path / "s", 1 << 20)
    assert [bytes(x) for x in again.read([key(i) for i in range(40)])] == [content(i) for i in range(40)]
    assert again.totals() == (40 * (HEADER.size + 5000), 40)
    again.close()


def test_an_index_that_is_damaged_while_another_process_uses_it_is_refused(store, tmp_path):
    put(store, 1)
    for connection in store._connections:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (tmp_path / "store" / "v1" / "index.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match=r"damaged index .* that another process uses"):
        EntryStore(tmp_path / "store", 1 << 20)


def test_a_disk_that_fails_is_counted_and_costs_no_answer(store, monkeypatch):
    put(store, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(entry_store.os, "replace", full)
    assert not put(store, 2)
    assert store.counts["errors"] == 1 and held(store, [1, 2]) == {1}
    monkeypatch.undo()
    assert put(store, 2) and not list(store._new.iterdir())


WRITER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_entry_store import content, entry, key, put
    from tqext.entry_store import EntryStore
    store = EntryStore(Path(sys.argv[1]), int(sys.argv[4]))
    begin, end = int(sys.argv[2]), int(sys.argv[3])
    print("ready", flush=True)
    for i in range(begin, end):
        put(store, i, size=40000)
        for j, got in zip(range(max(begin, i - 5), i), store.read([key(j) for j in range(max(begin, i - 5), i)])):
            assert bytes(got) == content(j, 40000)
    assert store.counts["errors"] == store.counts["damaged"] == 0, store.counts
    print("done", flush=True)
"""


def start(folder, begin, end, max_bytes=1 << 30):
    script = textwrap.dedent(WRITER).format(tests=os.path.dirname(__file__))
    command = [sys.executable, "-c", script, str(folder), str(begin), str(end), str(max_bytes)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "ready\n" in iter(child.stdout.readline, "")  # an editable install says before it that it is up to date
    return child


def test_a_kill_loses_what_was_being_written_and_nothing_else(tmp_path):
    """The child is killed at random times; what is then there is whole, and index and files fit each other."""
    rng = random.Random(18)
    begin, longest = 0, 0
    for _ in range(8):
        child = start(tmp_path / "s", begin, begin + 100000)
        time.sleep(rng.uniform(0, 0.12))
        child.send_signal(signal.SIGKILL)
        child.wait()
        store = EntryStore(tmp_path / "s", 1 << 30)
        names = {p.name for p in files(tmp_path / "s")}
        there = [i for i in range(begin, begin + len(names) + 1) if key(i).hex() in names]
        assert there == list(range(begin, begin + len(there))), "the entries were written in their order"
        assert [bytes(x) for x in store.read([key(i) for i in there])] == [content(i, 40000) for i in there]
        assert store.totals() == ((HEADER.size + 40000) * len(names), len(names))
        assert not list(store._new.iterdir()) and store.counts["damaged"] == 0
        begin += len(there)
        longest = max(longest, len(there))
        store.close()
    assert longest > 3, "no child wrote anything before it was killed"


def test_processes_and_threads_share_a_folder(tmp_path):
    """Three processes write overlapping entries into a store that is too small for them, and all read."""
    bound = 60 * (HEADER.size + 40000)
    children = [start(tmp_path / "s", begin, begin + 150, bound) for begin in (0, 50, 100)]
    store = EntryStore(tmp_path / "s", bound)
    seen = 0
    while any(child.poll() is None for child in children):
        keys = [i for i in range(250) if key(i) in store.known([key(i)])]
        for i, got in zip(keys, store.read([key(i) for i in keys]), strict=False):
            assert bytes(got) == content(i, 40000)
            seen += 1
        assert store.totals()[0] <= bound
    assert [child.wait() for child in children] == [0] * 3
    assert [child.stdout.read() for child in children] == ["done\n"] * 3
    assert seen and store.counts["damaged"] == 0
    assert len(files(tmp_path / "s")) <= 60
    errors = []

    def use(n):
        try:
            for i in range(n, n + 40):
                put(store, i, size=40000)
                list(store.read([key(i), key(n)]))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(1000 + 20 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and store.counts["errors"] == 0 and store.totals()[0] <= bound
    store.close()


def test_ends_are_found_by_what_they_follow(store):
    put(store, 1)
    end = Entry(b"e" * 32, key(1), SPACE, END_KIND, 128, 70)
    assert store.write(end, [b"tail"], now())
    assert store.ends([key(0), key(1), key(2)]) == [(end.key, key(1), 70)]
    assert store.ends([key(0)]) == []
