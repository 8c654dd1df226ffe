"""The command line over mlx-lm's own commands, each in a process of its own."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from tiny import make_llama, save_chat_folder
from tqext import get_policy, models
from tqext.commands import cli


def tqext(*args, check=True):
    command = [sys.executable, "-m", "tqext", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


SIZES = (
    r"KV cache now: \d+ tokens in (.+) MB instead of (.+) MB in fp16 "
    r"\(\d+ coded, 64 first and \d+ recent ones exact\)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_folder(make_llama(), tmp_path_factory.mktemp("model"))


def test_generate_prints_what_was_compressed(folder):
    out = tqext("generate", "--model", folder, "--kv", "tq33", "--prompt", "hello " * 200, "-m", 8).stdout
    packed, plain = 3 * 2 * get_policy("tq33").recipe.bytes_per_token(64), 3 * 2 * 2 * 64 * 2
    assert f"KV cache tq33: 3 of 3 layers compressed, {packed} bytes per token instead of {plain} in fp16" in out
    assert "tokens-per-sec" in out
    used, plain = map(float, re.search(SIZES, out).groups())
    assert 0 < used < plain


def test_generate_options_reach_the_policy(folder):
    args = ("--model", folder, "--kv", "tq4", "--kv-first-last", 1, "--kv-tail", 7, "--kv-report", "--prompt", "x", "-m", 2)
    out = tqext("generate", *args).stdout
    assert "KV cache tq4: 1 of 3 layers compressed" in out
    assert "KVCache stays: left out by the policy" in out
    assert "K4 V4 Lloyd, tail 7, first 64, 2 heads of 64/64" in out


def test_generate_without_compression(folder):
    assert "KV cache" not in tqext("generate", "--model", folder, "--kv", "none", "--prompt", "x", "-m", 2).stdout


def test_cache_prompt_and_generate_from_the_file(folder, tmp_path):
    file = tmp_path / "prompt.safetensors"
    tqext("cache_prompt", "--model", folder, "--kv", "tq33", "--prompt", "a story " * 40, "--prompt-cache-file", file)
    done = tqext("generate", "--prompt-cache-file", file, "--kv", "tq33", "--prompt", "and?", "-m", 4)
    assert "tokens-per-sec" in done.stdout
    assert done.stderr.count("KV cache from the file: 3 of 3 layers compressed\n") == 1
    assert re.search(SIZES, done.stdout)
    for kv in ("tq4", "none"):
        done = tqext("generate", "--prompt-cache-file", file, "--kv", kv, "--prompt", "and?", "-m", 4)
        assert f"3 of 3 layers compressed as they were saved, which --kv {kv} does not change" in done.stderr


def test_generate_compresses_a_plain_cache_from_a_file(folder, tmp_path):
    file = tmp_path / "prompt.safetensors"
    tqext("cache_prompt", "--model", folder, "--kv", "none", "--prompt", "a story " * 40, "--prompt-cache-file", file)
    done = tqext("generate", "--prompt-cache-file", file, "--kv", "tq33", "--prompt", "and?", "-m", 4)
    assert "KV cache from the file: 3 of 3 layers compressed\n" in done.stderr
    assert re.search(SIZES, done.stdout)
    done = tqext("generate", "--prompt-cache-file", file, "--kv", "none", "--prompt", "and?", "-m", 4)
    assert "KV cache from the file: 0 of 3 layers compressed\n" in done.stderr


def test_benchmark_in_a_batch(folder):
    done = tqext("benchmark", "--model", folder, "--kv", "tq33", "-p", 80, "-g", 8, "-b", 2, "-n", 1)
    assert "Averages" in done.stdout
    assert "3 of 3 layers compressed" in done.stderr


def test_chat_ends_with_its_input(folder):
    command = [sys.executable, "-m", "tqext", "chat", "--model", str(folder), "--kv", "tq33", "--max-tokens", "4"]
    done = subprocess.run(command, input="hi\nq\n", capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 layers compressed" in done.stderr


TASK = """
task: echo
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: 0
doc_to_choice: ["yes", "no"]
metric_list:
  - metric: acc
"""


def test_evaluate_runs_or_says_what_is_missing(folder, tmp_path):
    """mlx-lm's evaluation harness is a package of its own."""
    data, task = tmp_path / "data.jsonl", tmp_path / "echo.yaml"
    data.write_text("".join(json.dumps({"text": f"Is {i} a number? "}) + "\n" for i in range(3)))
    task.write_text(TASK.format(data=data))
    args = ("evaluate", "--model", folder, "--kv", "tq33", "--tasks", task, "--output-dir", tmp_path)
    done = tqext(*args, check=False)
    if importlib.util.find_spec("lm_eval") is None:
        assert done.returncode == 2
        assert "mlx_lm.evaluate needs the package lm_eval" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "3 of 3 layers compressed" in done.stderr


def test_eval_writes_json(folder, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    args = ("--text", text, "--window", 120, "--windows", 2, "--step", 8, "--json", out)
    printed = tqext("eval", "--model", folder, "--kv", "tq4", *args).stdout
    (row,) = json.loads(out.read_text())["quality"]
    assert row["preset"] == "tq4"
    assert row["n_tokens"] == 2 * 119
    assert 0 < row["kl"] < 1
    assert 0.5 < row["ratio"] < 2
    assert "tq4" in printed


def test_plan_and_doctor(folder):
    out = tqext("plan", "--model", folder, "--memory", "64M", "--context", 4096).stdout
    assert "none" in out
    assert "fits" in out
    out = tqext("doctor").stdout
    assert "path proof        ok" in out
    assert "attention         ok" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", "--kv", "tq5", "--model", "x"), "expected tq2, tq3, tq33, tq4 or none"),
        (("generate", "--model", "x", "--kv-bits", "4"), "--kv-bits is for mlx-lm's own cache"),
        (("server", "--model", "x", "--kv-bits=4"), "--kv-bits is for mlx-lm's own cache"),
        (("generate", "--model", "nothing-here"), "[load] name: expected a folder"),
        (("nonsense",), "unknown command 'nonsense'"),
    ],
)
def test_wrong_commands_say_why(args, message):
    done = tqext(*args, check=False)
    assert done.returncode != 0
    assert message in done.stderr


def test_usage_and_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "tqext demo" in capsys.readouterr().out
    cli.main(["--version"])
    assert capsys.readouterr().out.strip()


def test_names_resolve(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve(str(tmp_path)) == str(tmp_path)
    assert models.resolve("mlx-community/some-model") == "mlx-community/some-model"
    monkeypatch.setenv("TQEXT_CACHE", str(tmp_path))
    assert models.cache_dir() == tmp_path
