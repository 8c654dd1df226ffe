"""The texts of the quality figures, from Debian packages: no text is kept in this repository."""

from __future__ import annotations

import argparse
import html
import re
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

ZLIB_HEADER = b"\x78"


def unpack_debian(package: str, folder: Path) -> None:
    """Download a Debian package and unpack its files."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise RuntimeError("the texts come from Debian packages: apt-get and dpkg-deb are needed")
    subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["dpkg-deb", "-x", str(next(folder.glob(f"{package}_*.deb"))), str(folder)], check=True)


def emma(folder: Path) -> str:
    """The novel, from the R data of r-cran-janeaustenr: zlib streams of R's serialised character vectors."""
    unpack_debian("r-cran-janeaustenr", folder)
    data = next(folder.glob("**/janeaustenr/data/Rdata.rdb")).read_bytes()
    streams, begin = [], 0
    while begin < len(data):
        # R writes the length of the plain text, big-endian, before each stream.
        begin = data.find(ZLIB_HEADER, begin)
        if begin < 0:
            break
        decoder = zlib.decompressobj()
        try:
            streams.append(decoder.decompress(data[begin:]))
            begin = len(data) - len(decoder.unused_data)
        except zlib.error:
            begin += 1
    return max((_lines(s) for s in streams if b"EMMA" in s), key=len)


def _lines(serialised: bytes) -> str:
    """The strings of a serialised character vector: a type word (..09), a length, and the bytes of each."""
    lines, at = [], 0
    while at + 8 <= len(serialised):
        flags, length = (
            int.from_bytes(serialised[at : at + 4], "big"),
            int.from_bytes(serialised[at + 4 : at + 8], "big", signed=True),
        )
        if flags & 0xFF == 9 and 0 <= length <= len(serialised) - at - 8:
            lines.append(serialised[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        else:
            at += 1
    body = "\n".join(lines)
    return body[body.find("Emma Woodhouse") :]


def modern_prose(folder: Path) -> str:
    """One section of the anarchism package, without its markup."""
    unpack_debian("anarchism", folder)
    page = next(folder.glob("**/html/secI3.html*"))
    raw = page.read_bytes()
    if page.suffix == ".gz":
        import gzip

        raw = gzip.decompress(raw)
    body = re.sub(r"(?s)<(script|style|head).*?</\1>", " ", raw.decode("utf-8", "replace"))
    plain = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?i)</p>|<br\s*/?>", "\n", body)))
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t\r]+", " ", plain)).strip()


TEXTS = {"emma": emma, "modern": modern_prose}


def read(name: str) -> str:
    """A text by its name in `TEXTS`."""
    with tempfile.TemporaryDirectory() as folder:
        return TEXTS[name](Path(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=TEXTS)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.write_text(read(options.name))
