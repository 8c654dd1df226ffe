"""Tensor and pipeline parallelism under mlx.launch, two processes on one machine over the ring backend."""

import json
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import mlx_lm
import pytest

import tqext
from q1_models import make_one_bit
from server_support import Server
from tiny import greedy, make_llama, make_qwen2, prompt, save_chat_folder

LAUNCH = [sys.executable, str(Path(sys.executable).with_name("mlx.launch")), "--backend", "ring", "-n", "2"]
N = 6  # tokens of an answer


def launch(script, *args):
    """Two processes of a script in this folder."""
    here = Path(__file__).parent
    command = [*LAUNCH, "--env", f"PYTHONPATH={here}", "--python", sys.executable, str(here / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return done.stdout + done.stderr


PARTS = {"tensor": make_llama, "one-bit": make_one_bit, "pipeline": make_qwen2}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Where the processes left their tokens, and what they said."""
    folder = tmp_path_factory.mktemp("parts")
    return folder, launch("distributed_check.py", folder, *PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_two_processes_give_the_tokens_of_one(launched, part):
    """For one prompt, for a batch, and from a prefix store."""
    folder, said = launched
    out = folder / f"{part}.json"
    assert out.exists(), said
    model = PARTS[part]()
    alone = [greedy(model, p, 12, cache=tqext.make_prompt_cache(model)) for p in (prompt(250), prompt(40, 1))]
    tqext.uninstall()
    assert json.loads(out.read_text()) == [alone[0], *alone]


def test_a_server_of_two_ranks_answers_as_one_and_restores_prompts(tmp_path):
    """What it threw out of memory comes back from the disk of both."""
    folder, store = save_chat_folder(make_llama(), tmp_path / "model"), tmp_path / "store"
    options = ("--kv", "tq3-plain", "--kv-no-guard", "--prefix-store", str(store), "--prompt-cache-size", "1")
    server = Server(folder, *options, launcher=[*LAUNCH, "--"])
    try:
        questions = [[{"role": "user", "content": f"Number {i} " + "fox " * 90}] for i in range(2)]
        first = server.chat(questions[0], max_tokens=N)
        with pytest.raises(urllib.error.HTTPError, match="400"):
            server.chat(questions[1], logit_bias={"100000": 1.0})
        server.chat(questions[1], max_tokens=N)
        n = first["usage"]["prompt_tokens"]
        deadline = time.monotonic() + 60
        while sum(len(path.name) == 64 for path in store.glob("v1/??/*")) < 2 * 2 * ((n - 192) // 64):
            assert time.monotonic() < deadline, "both ranks write both prompts"
            time.sleep(0.1)
        again = server.chat(questions[0], max_tokens=N)
        assert n - 192 <= again["usage"]["prompt_tokens_details"]["cached_tokens"] < n
        assert again["usage"]["completion_tokens"] == N
        assert "Error" not in server.text()
    finally:
        server.close()
    model, tokenizer = mlx_lm.load(str(folder))
    text = tokenizer.apply_chat_template(questions[0], add_generation_prompt=True)
    cache = tqext.make_prompt_cache(model, "tq3-plain", guard=False)
    alone = mlx_lm.generate(model, tokenizer, text, max_tokens=N, prompt_cache=cache)
    tqext.uninstall()
    assert first["choices"][0]["message"]["content"] == alone
