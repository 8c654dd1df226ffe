"""The examples run to their end on the small model."""

import subprocess
import sys
from pathlib import Path

import pytest

from support import with_blas

pytestmark = pytest.mark.usefixtures("small_model")

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=with_blas(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_custom_model_keeps_less_than_a_third():
    lines = run("custom_model.py", "--steps", "3").splitlines()
    exact, packed = (float(line.split("history")[1].split()[0]) for line in lines[-2:])
    assert packed < exact / 3


def test_example_long_document_answers(tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("The lighthouse keeper is called Tobias. He has a grey cat. " * 6)
    out = run("long_document.py", "--document", str(document), "--question", "What is the keeper called?", "--max-tokens", "12")
    assert "Tobias" in out.split(">")[-1]


def test_example_two_clients_reuse_their_own_prompt():
    out = run("two_clients.py", "--max-tokens", "8")
    assert "Paris" in out
    cached, total = (int(out.splitlines()[-1].split()[i]) for i in (0, 2))
    assert 0 < cached < total
