"""Tensor and pipeline parallelism under mlx.launch, two processes on one machine over the ring backend."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tqext
from q1_models import make_one_bit
from tiny import greedy, make_llama, make_qwen2, prompt


def launch(script, *args):
    """Two processes of a script in this folder."""
    here = Path(__file__).parent
    command = [sys.executable, str(Path(sys.executable).with_name("mlx.launch")), "--backend", "ring", "-n", "2"]
    command += ["--env", f"PYTHONPATH={here}", "--python", sys.executable, str(here / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.parametrize(("part", "make"), [("tensor", make_llama), ("one-bit", make_one_bit), ("pipeline", make_qwen2)])
def test_two_processes_give_the_tokens_of_one(tmp_path, part, make):
    """For one prompt and for a batch."""
    out = tmp_path / "tokens.json"
    said = launch("distributed_check.py", part, out)
    assert out.exists(), said
    model = make()
    alone = [greedy(model, p, 12, cache=tqext.make_prompt_cache(model)) for p in (prompt(250), prompt(40, 1))]
    tqext.uninstall()
    assert json.loads(out.read_text()) == [alone[0], *alone]


def test_ranks_restore_as_many_tokens_as_all_of_them_have(tmp_path):
    """Heads and layers; whatever is missing or damaged on one of them."""
    out = tmp_path / "done"
    said = launch("distributed_prefix_check.py", tmp_path / "store", out)
    assert out.exists(), said
