"""A user's first hour, typed into a terminal: every command answers as it should, and no message is a traceback.

    python tests/first_hour.py [--model FOLDER] [--python PYTHON]

Runs the `tqext` of the interpreter PYTHON (default: this one) in a shell of its own; `scripts/first_hour` does so for fresh
installations. Prints the transcript and ends with status 1 at the first line that is wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pexpect

PROMPT = "<ready {status}>"
CTRL_C = "<Ctrl-C>"


@dataclass(frozen=True)
class Step:
    """A line that is typed, what must be shown (a regular expression), and the status of the command."""

    line: str
    expected: str
    status: int = 0
    # Lines of a command that asks on: what it shows first, what is typed then.
    answers: tuple[tuple[str, str], ...] = ()


def steps(model: str, port: int, tokens: int) -> list[Step]:
    """The hour. MODEL answers with at least a few tokens and never ends an answer by itself, or it is a real one."""
    server = f"tqext server --model {model} --port {port}"
    return [
        # Looks around.
        Step("tqext", r"tqext demo +what a compressed cache saves", 2),
        Step("tqext --help", r"presets \(--kv help shows all\)"),
        Step("tqext --version", r"\d+\.\d+"),
        Step("tqext doctor", r"path proof"),
        Step(f"tqext demo --model {model} --tokens {tokens}", r"Memory.* times less(.|\n)*Speed(.|\n)*Quality"),
        Step(f"tqext generate --model {model} --prompt hello -m 4", r"layers compressed(.|\n)*instead of \d+ MB in fp16"),
        Step("tqext generate --help", r"--kv PRESET"),
        Step("tqext generate --kv help", r"tq33 .*half the error"),
        # Types something wrong.
        Step("tqext genrate", r"unknown command 'genrate'", 1),
        Step("tqext generate --modle x", r"unrecognized arguments: --modle", 2),
        Step("tqext generate --model ./nowhere --prompt x", r"expected a folder", 1),
        Step("tqext generate --model . --prompt x", r"expected a model's folder, got .*config.json: No such file", 1),
        Step(f"tqext generate --model {model} --temp warm", r"--temp: expected a number from 0 on, got 'warm'", 2),
        Step(f"tqext generate --model {model} --kv tq5", r"expected tq2, tq3, tq33, tq4 or none", 2),
        Step(f"tqext generate --model {model} --kv-bits 4", r"leave it out, or say --kv none", 2),
        Step(f"tqext generate --model {model} --prompt x -m 3 | head -1", r"=+"),
        # Will it fit?
        Step(f"tqext plan --model {model} --memory 16GB", r"Recommended: --kv tq4"),
        Step(f"tqext plan --model {model} --memory lots", r"expected a size such as 16GB", 2),
        # Talks, stops an answer, goes on.
        Step(
            f"tqext chat --model {model} --kv tq33 --max-tokens 100000",
            r"",
            answers=(
                ("layers compressed", "Tell me a long story."),
                ("", CTRL_C),
                (r"\[stopped\]", "Go on."),
                ("", CTRL_C),
                (r"\[stopped\]", "q"),
            ),
        ),
        Step(
            f"tqext generate --model {model} --prompt 'Tell me a long story about a river.' -m 100000",
            r"",
            130,
            answers=((r"=====", ""), ("", CTRL_C)),
        ),
        # Keeps a prompt, and takes another preset for it.
        Step(
            f"tqext cache_prompt --model {model} --prompt 'Once upon a time' --prompt-cache-file kept.safetensors",
            r"layers compressed",
        ),
        Step("tqext generate --prompt-cache-file kept.safetensors --prompt x -m 2", r"from the file: \d+ of \d+ layers"),
        Step("tqext generate --prompt-cache-file kept.safetensors --kv tq4 --prompt x -m 2", r"which --kv tq4 does not change"),
        Step("tqext generate --prompt-cache-file lost.safetensors --prompt x", r"lost.safetensors, which is no file", 1),
        # Serves it: another server has the port, then Ctrl-C.
        Step(f"{server} --prefix-store prompts 2> server.log &", r"\[1\]"),
        Step(f"until curl -sf localhost:{port}/health; do sleep 0.3; done", r"ok"),
        Step(f"curl -s localhost:{port}/v1/models", rf'"id": "{re.escape(model)}"'),
        Step(f"curl -s localhost:{port}/ | head -3", r"<!doctype html>"),
        Step(
            f"curl -s localhost:{port}/v1/chat/completions -d "
            """'{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}'""",
            r'"completion_tokens": 3',
        ),
        Step(f"curl -s localhost:{port}/stats", r'"prefix_store": {"hits": 0, "misses": 1'),
        Step(f"curl -s localhost:{port}/v1/chat/completions -d '{{}}'", r"messages: expected a list of messages"),
        Step(server, r"tqext server: .*a free port, got 127.0.0.1 and \d+: Address already in use", 1),
        Step(
            f"tqext server --model {model} --port 99999",
            r"tqext server: .*a free port, got 127.0.0.1 and 99999: ports end at 65535",
            1,
        ),
        Step(f"tqext server --model {model} --host nowhere.invalid", r"tqext server: .*got nowhere.invalid and 8080", 1),
        Step("kill -INT %1; wait %1", r""),
        Step("grep -c Trace[b]ack server.log", r"^0", 1),
        Step(server, r"", answers=((r"Starting httpd", ""), ("", CTRL_C))),
        # In Python.
        Step("python -c 'import tqext; print(tqext.install)'", r"<function install"),
        Step("python -c 'import tqext; tqext.install(\"tq5\")' 2>&1 | tail -1", r"ValueError: .*expected one of tq3"),
    ]


class Hour:
    """A shell, and all that was seen in it."""

    def __init__(self, python: str, folder: str, log: object) -> None:
        environment = os.environ | {"PYTHON": python, "TERM": "dumb", "HF_ENDPOINT": "http://127.0.0.1:9"}
        # Without an editor of lines, which would show what is typed again.
        self.shell = pexpect.spawn(
            "bash",
            ["--norc", "--noprofile", "--noediting"],
            echo=False,
            encoding="utf-8",
            timeout=180,
            cwd=folder,
            env=environment,
        )
        self.shell.setwinsize(50, 200)
        self.shell.logfile_read = log
        # The quotes keep the prompt itself out of what the terminal shows of this line.
        self.shell.sendline('PS1=\'\' PS2=\'\'; tqext() { "$PYTHON" -m tqext "$@"; }; python() { "$PYTHON" "$@"; }')
        self.shell.sendline('PROMPT_COMMAND=\'echo "<rea""dy $?>"\'')
        self.shell.expect(r"<ready 0>")

    def run(self, step: Step) -> str:
        """What a step showed; an AssertionError says what was wrong with it."""
        self.shell.sendline(step.line)
        seen = ""
        for expected, typed in step.answers:
            if expected:
                self.shell.expect([expected])
                seen += self.shell.before + self.shell.after
            if typed == CTRL_C:
                time.sleep(1)  # into the answer
                self.shell.sendintr()
            elif typed:
                self.shell.sendline(typed)
        self.shell.expect(r"<ready (\d+)>")
        seen += self.shell.before
        status = int(self.shell.match[1])
        seen = seen.replace("\r", "")
        assert "Traceback" not in seen, f"{step.line}: a traceback:\n{seen}"
        assert status == step.status, f"{step.line}: expected status {step.status}, got {status}:\n{seen}"
        assert re.search(step.expected, seen, re.MULTILINE), f"{step.line}: expected {step.expected!r}, got:\n{seen}"
        return seen


def hour(model: str, python: str, log: object, tokens: int) -> None:
    """Goes through all steps in an empty folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        if os.path.isdir(model):
            Path(folder, "model").symlink_to(os.path.abspath(model))
            model = "model"
        shell = Hour(python, folder, log)
        try:
            for step in steps(model, port, tokens):
                log.write(f"\n$ {step.line}\n")
                shell.run(step)
        finally:
            shell.shell.close(force=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--tokens", type=int, default=600, help="of the document of tqext demo")
    options = parser.parse_args()
    # A shell without job control has commands in the background ignore SIGINT, and so would what this one starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        hour(options.model, options.python, sys.stdout, options.tokens)
    except (AssertionError, pexpect.ExceptionPexpect) as error:
        raise SystemExit(f"\nfirst_hour: {error}") from None
    print("\nfirst_hour: no command answered with a traceback")


if __name__ == "__main__":
    main()
