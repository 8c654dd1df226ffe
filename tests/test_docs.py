"""Every code block of the README and the documentation runs; every block says what it is."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support import with_blas

pytestmark = pytest.mark.usefixtures("small_model")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# python and bash blocks are executed here; console and text blocks are transcripts (other machines, hardware, installing).
LANGUAGES = {"python", "bash", "console", "text", "json"}
# The set-up commands are what .ci/run executes, in a fresh virtual environment.
SET_UP = "python3 -m venv"


def run(folder, *arguments):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=500, env=with_blas(), check=False)
    assert done.returncode == 0, done.stderr


def blocks(page, language):
    return [code for found, code in FENCE.findall(page.read_text()) if found.strip() == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_docs_blocks_name_a_known_language(page):
    assert {language.strip() for language, _ in FENCE.findall(page.read_text())} <= LANGUAGES


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_docs_python_blocks_run(page, tmp_path):
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(blocks(page, "python")))
    run(tmp_path, str(script))


COMMANDS = [
    (page.stem, line)
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith(SET_UP)
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}-{line[:40]}" for page, line in COMMANDS])
def test_docs_commands_run(page, line, tmp_path):
    words = shlex.split(line)
    assert words[0] == "tqext", f"{page}: expected a tqext command or a set-up command, got {line}"
    run(tmp_path, "-m", "tqext", *words[1:])


def test_docs_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_api_reference_names_everything_public():
    import tqext

    named = re.findall(r"^::: tqext\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == {name for name in tqext.__all__ if name != "__version__"} | {"nn"}


def test_every_page_is_in_the_navigation():
    """As a strict build demands; the generated parts are no pages."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    assert sorted(re.findall(r"\b(\w+\.md)\b", nav)) == [page.name for page in PAGES[1:]]
