"""Tensor and pipeline parallelism under mlx.launch, two processes on one machine over the ring backend."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tqext
from q1_models import make_one_bit
from tiny import greedy, make_llama, make_qwen2, prompt


@pytest.mark.parametrize(("part", "make"), [("tensor", make_llama), ("one-bit", make_one_bit), ("pipeline", make_qwen2)])
def test_two_processes_give_the_tokens_of_one(tmp_path, part, make):
    """For one prompt and for a batch."""
    here, out = Path(__file__).parent, tmp_path / "tokens.json"
    launch = [sys.executable, str(Path(sys.executable).with_name("mlx.launch")), "--backend", "ring", "-n", "2"]
    where = ["--env", f"PYTHONPATH={here}", "--python", sys.executable]
    command = [*launch, *where, str(here / "distributed_check.py"), part, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert out.exists(), done.stdout + done.stderr
    model = make()
    alone = [greedy(model, p, 12, cache=tqext.make_prompt_cache(model)) for p in (prompt(250), prompt(40, 1))]
    tqext.uninstall()
    assert json.loads(out.read_text()) == [alone[0], *alone]
