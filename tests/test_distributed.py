"""Tensor parallelism under mlx.launch, two processes on one machine over the ring backend."""

import json
import subprocess
import sys
from pathlib import Path

import tqext
from tiny import greedy, make_llama, prompt


def test_two_processes_give_the_tokens_of_one(tmp_path):
    here, out = Path(__file__).parent, tmp_path / "tokens.json"
    launch = [sys.executable, str(Path(sys.executable).with_name("mlx.launch")), "--backend", "ring", "-n", "2"]
    where = ["--env", f"PYTHONPATH={here}", "--python", sys.executable]
    command = [*launch, *where, str(here / "distributed_check.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert out.exists(), done.stdout + done.stderr
    model = make_llama()
    alone = greedy(model, prompt(120), 24, cache=tqext.make_prompt_cache(model))
    tqext.uninstall()
    assert json.loads(out.read_text()) == alone
