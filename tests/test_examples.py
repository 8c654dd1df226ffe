"""The examples run to their end on the small model."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from server_support import Server
from support import with_blas
from tiny import make_llama, save_chat_folder

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


def test_example_openai_client_speaks_as_a_coding_agent(tmp_path):
    pytest.importorskip("openai", reason="not installed: openai")
    server = Server(save_chat_folder(make_llama(), tmp_path / "tiny"), "--kv", "tq33")
    try:
        out = run("openai_client.py", "--url", f"http://127.0.0.1:{server.port}/v1", "--max-tokens", "8")
    finally:
        server.close()
    assert "Models: " in out
    assert 'read_file({"path": "calc.py"}) -> \'def add(a, b):' in out
    assert "failed: add(2, 3) is -1" in out
    turns = [tuple(map(int, found)) for found in re.findall(r"(\d+) prompt tokens, (\d+) of them from the cache", out)]
    assert len(turns) == 3
    for (before, _), (now, cached) in pairwise(turns):
        # The prompt of the turn before is found again, but for what its template adds at the end.
        assert before - 64 <= cached < now
