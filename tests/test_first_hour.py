"""A user's first hour at the command line: what he is shown, and one line where he does something wrong."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from tiny import CONFIG, make_llama, save_chat_folder
from tqext.commands import cli, demo, options, plan
from tqext.presets import PRESETS

TQEXT = [sys.executable, "-m", "tqext"]
# As if another release of mlx were installed.
OTHER_MLX = """
import importlib.metadata as metadata
installed = metadata.version
metadata.version = lambda package: "9.9.9" if package == "mlx" else installed(package)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = make_llama()
    model.lm_head.weight[256] = 0  # never the most probable token: no answer ends by itself
    return save_chat_folder(model, tmp_path_factory.mktemp("model") / "tiny", CONFIG | {"max_position_embeddings": 4096})


@pytest.fixture(scope="module")
def other_mlx(tmp_path_factory):
    place = tmp_path_factory.mktemp("other_mlx")
    (place / "sitecustomize.py").write_text(OTHER_MLX)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])}


def tqext(*args, status=0, **options):
    done = subprocess.run(
        [*TQEXT, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **{"stdin": subprocess.DEVNULL, **options},
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


# Of commands that are mlx-lm's own.
HELP = ("generate", "chat", "server", "cache_prompt", "benchmark")

# What is shown


def test_demo_shows_memory_speed_and_quality(folder):
    done = tqext("demo", "--model", folder, "--tokens", 600)
    memory, speed, quality = (line for line in done.stdout.splitlines() if line.startswith(("Memory", "Speed", "Quality")))
    # 64 first tokens, 87 recent ones in fp32, and 448 coded ones; 3 layers, 2 heads.
    coded, exact = 448 * PRESETS["tq3"].recipe.bytes_per_token(64), (600 - 448) * 2 * 64 * 4
    used, plain = 6 * (coded + exact) / 1e6, 6 * 600 * 2 * 64 * 2 / 1e6
    assert f"{used:.1f} MB instead of {plain:.1f} MB in fp16: {plain / used:.1f} times less" in memory
    assert re.search(r"[\d.]+ tokens/s instead of [\d.]+ with the uncompressed", speed)
    assert re.search(r"Perplexity is [\d.]+ instead of [\d.]+, and \d+% of the predicted tokens are the same", quality)
    assert "MB at 4096 tokens (the model's limit)" in done.stdout


def test_demo_finds_an_exact_cache_exact_and_a_coarse_one_coarse():
    """The figures come from the caches: nothing is lost where everything stays exact, and something with 2 bits."""
    import tqext as package

    tokens = [(7 * i * i + 3 * i) % 299 for i in range(600)]
    found = {}
    for name, tail in (("tq4", 1000), ("tq2", 0)):
        model = package.attach(make_llama(), name, tail=tail, guard=False)
        found[name] = demo.compare(model, tokens)
    assert found["tq4"].agreement == 1
    assert found["tq4"].compressed.perplexity == pytest.approx(found["tq4"].plain.perplexity, rel=1e-4)
    assert found["tq2"].agreement < 1
    assert found["tq2"].compressed.perplexity != pytest.approx(found["tq2"].plain.perplexity, rel=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_demo_reads_with_a_model_of_16_bits(dtype):
    """The prompt's attention is NumPy's, in fp32, and that of the following tokens MLX's: a cache has one type."""
    import tqext as package

    model = make_llama()
    model.set_dtype(dtype)
    found = demo.compare(package.attach(model, "tq4", tail=1000, guard=False), [(7 * i * i + 3 * i) % 299 for i in range(600)])
    # Everything is exact: what differs is the rounding of 16 bits.
    assert found.compressed.perplexity == pytest.approx(found.plain.perplexity, rel=2.0**-7)
    assert found.fp16_nbytes == 6 * 600 * 2 * 64 * 2


def test_generate_closes_with_what_a_long_context_takes(folder):
    last = tqext("generate", "--model", folder, "--prompt", "hello", "-m", 3).stdout.splitlines()[-1]
    assert re.fullmatch(
        r"KV cache now: \d+ tokens are still exact \(compression starts after 192\); "
        r"at 8192 tokens \d+ MB instead of 13 MB in fp16",
        last,
    )


@pytest.mark.parametrize("command", HELP)
def test_help_shows_our_options_first_and_none_that_is_refused(transcript, command):
    status, out = transcript[f"{command} --help"]
    assert status == 0
    assert out.index("\n  --kv PRESET") < out.index("\n  --kv-report") < out.index("\n  --model MODEL")
    assert "smollm2 (fetched from PyPI" in " ".join(out.split())
    assert not any(option in out for option in ("--kv-bits", "--kv-group-size", "--quantized-kv-start"))


def test_the_presets_for_use_come_first_and_kv_help_shows_all(capsys):
    assert set(cli.SHOWN_PRESETS) == {name for name, policy in PRESETS.items() if not policy.study}
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--kv", "help"])
    assert stop.value.code == 0
    words = capsys.readouterr().out.split()
    assert {*PRESETS, "none"} <= set(words)
    assert not set(PRESETS) - set(cli.SHOWN_PRESETS) & set(cli.USAGE.split())


def test_plan_knows_the_limit_and_recommends(folder, capsys):
    cli.main(["plan", "--model", str(folder), "--memory", "16GB"])
    out = capsys.readouterr().out
    assert "trained for 4096 tokens; 13.6 GB usable" in out
    assert [line.split()[0] for line in out.splitlines()[2:7]] == ["none", *cli.SHOWN_PRESETS]
    assert out.count("4096 (limit)") == 5
    assert "Recommended: --kv tq4, the most accurate preset with which 4096 tokens fit" in out
    cli.main(["plan", "--model", str(folder), "--memory", "4MB", "--context", "9000"])
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "9000 tokens are more than the model was trained for" in out


def test_plan_recommends_the_most_accurate_that_fits():
    plans = [plan.Plan(name, size, 0, 0) for name, size in (("tq2", 1), ("tq3", 2), ("tq33", 3), ("tq4", 4))]
    for memory, name in ((400, "tq4"), (399, "tq33"), (299, "tq3"), (100, "tq2"), (99, None)):
        assert plan.recommended(plans, memory, 100) == name


def test_plan_shows_what_was_measured():
    """The whole text's KL of the recorded runs, for the two head dimensions."""
    results = Path(__file__).parents[1] / "bench" / "results"
    if not results.is_dir():
        pytest.skip("the recorded runs are not in a source distribution")
    models = {"qwen2.5-coder-1.5b-4bit": 0, "qwen2.5-coder-0.5b-4bit": 1}
    found = {preset: [None, None] for preset in plan.QUALITY}
    for file in ("real_models_h200.json", "by_position.json"):  # of two runs of one preset the second is shown
        for run in json.loads((results / file).read_text())["runs"]:
            settings = run["settings"]
            if settings["bench"] != "by_position" or settings["model"] not in models or settings["tokens"] != 32768:
                continue
            for row in run["rows"]:
                if row["text"] == "prose" and row["cache"] in found:
                    found[row["cache"]][models[settings["model"]]] = round(row["whole"]["kl"], 4)
    assert {preset: tuple(kl) for preset, kl in found.items()} == plan.QUALITY
    assert plan.quality("tq2", 64) == "KL 0.0714"
    assert plan.quality("tq2", 128) == plan.quality("tq4", 128, latent=True) == plan.quality("bonsai", 64) == "not measured"


def test_sizes_are_read_as_people_write_them():
    """One meaning in all commands, and that of mlx-lm's own options."""
    expected = {"16G": 16 * 10**9, "16GB": 16 * 10**9, "16GiB": 16 << 30, "16 gib": 16 << 30, "1.5k": 1500, "2 TB": 2 * 10**12}
    expected |= {"512MiB": 512 << 20, ".5Ki": 512, "77": 77, "77B": 77}
    assert {text: options.n_bytes(text) for text in expected} == expected
    for text in ("", "GB", "16Q", "-16G", "0", "0.1", "1e9", "16GBB", "nan", "inf", "much"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 16GB or 16GiB, got"):
            options.n_bytes(text)


# What goes wrong

MISTAKES = [
    ("generate --model ./nowhere --prompt x", "expected a folder, a GGUF file, a hub id"),
    ("plan --model nowhere", "expected a folder, a GGUF file, a hub id"),
    (
        "generate --model nobody/nothing --prompt x",
        "the Hugging Face hub did not give the model: check its name and the network",
    ),
    ("plan --model nobody/nothing", "the Hugging Face hub did not give the model"),
    ("generate --kv tq5 --model x", "expected tq2, tq3, tq33, tq4 or none (help shows all presets), got 'tq5'"),
    ("generate --kv-tail -5 --model x", "expected a whole number from 0 on, got '-5'"),
    ("generate --kv-tail 99999999999 --model x", "[policy] tail: expected 0 to"),
    ("chat --kv-first-last -1 --model x", "expected a whole number from 0 on, got '-1'"),
    ("generate --model FOLDER --max-tokens many", "expected a whole number from 1 on, or -1 for no limit, got 'many'"),
    ("chat --model FOLDER --max-tokens -3", "expected a whole number from 1 on, or -1 for no limit, got '-3'"),
    ("generate --model FOLDER --temp nan", "argument --temp: expected a number from 0 on, got 'nan'"),
    ("generate --model FOLDER --top-p 7", "argument --top-p: expected a number from 0 to 1, got '7'"),
    ("generate --model FOLDER --seed -1", "argument --seed: expected a whole number from 0 to"),
    ("generate --model FOLDER --max-kv-size 0", "argument --max-kv-size: expected a whole number from 1 on, got '0'"),
    ("benchmark --model FOLDER --prompt-tokens 0", "expected a whole number from 1 on, got '0'"),
    ("server --model FOLDER --max-tokens -1", "argument --max-tokens: expected a whole number from 1 on, got '-1'"),
    ("server --model FOLDER --decode-concurrency -3", "expected a whole number from 1 on, got '-3'"),
    ("server --model FOLDER --prompt-cache-bytes much", "expected a size such as 16GB or 16GiB, got 'much'"),
    ("server --model FOLDER --prefix-store FOLDER/config.json", "expected a folder, or a place for one"),
    ("generate --model FOLDER --nonsense", "unrecognized arguments: --nonsense"),
    ("generate --model FOLDER --kv-bits 4", "--kv-bits is for mlx-lm's own cache: leave it out, or say --kv none"),
    ("plan --model FOLDER --memory 16Q", "expected a size such as 16GB or 16GiB, got '16Q'"),
    ("plan --model FOLDER --context -5", "expected a whole number from 1 on, got '-5'"),
    ("eval --model FOLDER", "--text: expected a plain text file"),
    ("eval --model FOLDER --text nowhere.txt", "nowhere.txt: No such file or directory"),
    ("eval --model FOLDER --text FOLDER/model.safetensors", "expected a text file in UTF-8"),
    ("eval --model FOLDER --text FOLDER/config.json --window -5", "expected a whole number from 1 on, got '-5'"),
    ("demo --model FOLDER --tokens 100", "expected at least 512, got 100"),
    ("demo --model FOLDER --text FOLDER/config.json", "expected at least 512, got"),
    ("demo --model FOLDER --kv none", "expected a preset to compare"),
    ("generate --prompt x --prompt-cache-file nowhere.safetensors", "nowhere.safetensors, which is no file"),
    ("generate --prompt x --prompt-cache-file FOLDER/model.safetensors", "expected a saved prompt cache"),
    ("generate --prompt x --prompt-cache-file FOLDER/config.json", "expected a saved prompt cache"),
    ("generate --model FOLDER/config.json --prompt x", "expected a folder"),
    ("generate --model EMPTY --prompt x", "config.json: No such file or directory"),
    ("plan --model CUT", "got CUT: model.safetensors is damaged, or not the whole file"),
    ("generate --model POINTER --prompt x", "got POINTER: model.safetensors is damaged, or not the whole file"),
    ("plan --model TEXT", "got TEXT: config.json is damaged, or not the whole file"),
    ("quantize-1bit --model FOLDER --out FOLDER", "exists"),
    ("nonsense", "unknown command 'nonsense'"),
]
# Runs command after command in one process.
RUNNER = """
import contextlib, io, json, sys, traceback
from tqext.commands import cli
results = []
for args in json.load(sys.stdin):
    text, status = io.StringIO(), 0
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            cli.main(args)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            print("" if isinstance(stop.code, int) else stop.code)
        except BaseException:
            traceback.print_exc()
    results.append([status, text.getvalue()])
json.dump(results, sys.stdout)
"""


def damage(folder, copy, name, content):
    """A model's folder with another file in it."""
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(content)


@pytest.fixture(scope="module")
def transcript(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("folders")
    weights = (folder / "model.safetensors").read_bytes()
    (empty := place / "EMPTY").mkdir()
    damage(folder, place / "CUT", "model.safetensors", weights[:-1])
    damage(folder, place / "POINTER", "model.safetensors", b"version https://git-lfs.github.com/spec/v1\n")
    damage(folder, place / "TEXT", "config.json", b"{")
    commands = [*(words for words, _ in MISTAKES), *(f"{command} --help" for command in HELP)]
    lines = [words.replace("FOLDER", str(folder)).split() for words in commands]
    # Nothing answers there.
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(empty)}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[words[:50] for words, _ in MISTAKES])
def test_a_mistake_is_one_line_with_the_remedy(transcript, words, expected):
    status, text = transcript[words]
    assert status in (1, 2)
    (line,) = text.strip().splitlines()
    assert expected in line
    assert line.startswith("tqext")


def test_debug_gives_the_traceback():
    done = subprocess.run(
        [*TQEXT, "plan", "--model", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TQEXT_DEBUG": "1"},
    )
    assert "Traceback" in done.stderr
    assert "[load] name" in done.stderr


def test_faults_keep_their_traceback(monkeypatch):
    """One line is for what a user can mend; of a fault somebody wants to know where it is."""

    def broken(args):
        raise KeyError("fault")

    monkeypatch.setattr(plan, "main", broken)
    with pytest.raises(KeyError):
        cli.main(["plan"])


@pytest.mark.parametrize("damage", ["a file", "cut off", "no tokenizer"])
def test_a_damaged_cache_folder_is_named(tmp_path, damage, capsys, monkeypatch, small_model):
    """The folder of the built-in model."""
    place = tmp_path / "cache"
    if damage == "a file":
        place.write_text("")
    else:
        made = place / Path(small_model).name
        made.mkdir(parents=True)
        for file in Path(small_model).iterdir():
            if file.suffix == ".json":
                (made / file.name).write_bytes(file.read_bytes())
        with (Path(small_model) / "model.safetensors").open("rb") as weights:
            (made / "model.safetensors").write_bytes(weights.read(1 << 20))
        if damage == "no tokenizer":
            (made / "model.safetensors").unlink()
            (made / "model.safetensors").symlink_to(Path(small_model) / "model.safetensors")
            (made / "tokenizer.json").unlink()
    monkeypatch.setenv("TQEXT_CACHE", str(place))
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--model", "smollm2"])
    expected = "TQEXT_CACHE can name another cache folder" if damage == "a file" else "the folder is damaged"
    assert expected in str(stop.value.code)
    assert str(place) in str(stop.value.code)


def test_help_and_doctor_run_beside_another_mlx(other_mlx):
    assert "usage: tqext" in tqext("--help", env=other_mlx).stdout
    out = tqext("doctor", env=other_mlx, status=1).stdout
    assert re.search(r"mlx +9.9.9\n", out)
    assert "found 9.9.9: run `pip install" in out
    error = tqext("generate", "--model", "x", env=other_mlx, status=1).stderr
    assert "found 9.9.9: run `pip install" in error
    assert len(error.strip().splitlines()) == 1
    done = subprocess.run([sys.executable, "-c", "import tqext"], capture_output=True, text=True, check=False, env=other_mlx)
    assert "ImportError: tqext was built for mlx" in done.stderr


def test_a_closed_pipe_ends_quietly(folder):
    command = f"{sys.executable} -m tqext generate --model {folder} --prompt x -m 40 | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.startswith("==========")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_tests_without_the_optional_tools_are_one_line_for_each_module(tmp_path):
    """What the README's test command shows on a machine without Clang 19 and the emulators."""
    for name in ("cmake", "ninja"):  # an editable installation looks whether it is up to date
        if program := shutil.which(name):
            (tmp_path / name).symlink_to(program)
    chosen = ("tests/test_isa.py", "-k", "kernels_of or golden_bytes")
    environment = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *chosen],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parent.parent,
        env=environment | {"PATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("tests/test_isa.py: "))
    assert re.fullmatch(r"tests/test_isa.py: \d+ skipped \(not installed: .*\)", line)
    assert not re.search(r"\bs{2,}", done.stdout)


# The whole hour


def test_an_hour_in_a_terminal_shows_no_traceback(folder, capsys):
    """Every command that a newcomer types, one after the other (tests/first_hour.py)."""
    first_hour = pytest.importorskip("first_hour", reason="not installed: pexpect")
    first_hour.hour(str(folder), sys.executable, sys.stdout, 600)
    assert "<ready 0>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "expected", "complaint"),
    [
        ("python -c 'raise KeyError(1)'", "", "a traceback"),
        ("true", "", None),
        ("false", "", "expected status 0, got 1"),
        ("echo one", "two", "expected 'two', got"),
    ],
)
def test_the_hour_sees_what_is_wrong(line, expected, complaint, tmp_path):
    first_hour = pytest.importorskip("first_hour", reason="not installed: pexpect")
    shell = first_hour.Hour(sys.executable, str(tmp_path), None)
    try:
        if complaint is None:
            shell.run(first_hour.Step(line, expected))
        else:
            with pytest.raises(AssertionError, match=complaint):
                shell.run(first_hour.Step(line, expected))
    finally:
        shell.shell.close(force=True)


# Ctrl-C


def test_ctrl_c_ends_generate_quietly(folder):
    process = subprocess.Popen(
        [*TQEXT, "generate", "--model", str(folder), "--prompt", "x", "-m", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("=====")  # it answers
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + error


def test_ctrl_c_stops_an_answer_of_chat_and_keeps_the_conversation(folder):
    pexpect = pytest.importorskip("pexpect")
    chat = pexpect.spawn(
        sys.executable, ["-m", "tqext", "chat", "--model", str(folder), "--max-tokens", "100000"], timeout=120, encoding="utf-8"
    )
    chat.setwinsize(40, 200)
    chat.expect("layers compressed")
    for question in ("first", "second"):
        chat.sendline(question)
        time.sleep(2)
        chat.sendintr()
        chat.expect_exact("[stopped]")
    chat.sendline("q")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
