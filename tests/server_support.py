"""A running ``tqext server``, and what the tests ask it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from support import with_steady_malloc

MAX_TOKENS = 24


class Server:
    """``launcher``: words of a command that starts the server's processes; all are interrupted as from a terminal."""

    def __init__(self, folder, *options, named=None, launcher=()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.launched = bool(launcher)
        command = [*launcher, sys.executable, "-m", "tqext", "server"]
        command += ["--model", named or str(folder), "--port", str(self.port)]
        command += options
        self.log = (folder / "server.log").open("w+")
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, env=with_steady_malloc(), start_new_session=self.launched
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).read()
                return
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(self.text()) from None
                time.sleep(0.2)

    def text(self):
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def request(self, messages, **options):
        body = {"messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0.0} | options
        return urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )

    def chat(self, messages, **options):
        with urllib.request.urlopen(self.request(messages, **options), timeout=120) as reply:
            return json.load(reply)

    def answer(self, messages, **options):
        return self.chat(messages, **options)["choices"][0]["message"]["content"]

    def stream(self, messages, **options):
        text = ""
        with urllib.request.urlopen(self.request(messages, stream=True, **options), timeout=120) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        return text

    def complete(self, text, **options):
        """What follows a text as it stands, without the chat template."""
        body = {"prompt": text, "max_tokens": MAX_TOKENS, "temperature": 0.0} | options
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["choices"][0]["text"]

    def resident(self):
        """Bytes of the server in memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def abort(self, messages):
        """Hang up in the middle of an answer."""
        reply = urllib.request.urlopen(self.request(messages, stream=True, max_tokens=400), timeout=120)
        reply.read(10)
        reply.close()

    def _ranks(self):
        """Processes of the launcher's group that run, without itself."""
        running = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                state, _, group, *_ = path.read_text().rpartition(")")[2].split()
                pid = int(path.parent.name)
                if int(group) == self.process.pid != pid and state != "Z":
                    running.append(pid)
        return running

    def close(self):
        if self.launched:
            os.killpg(self.process.pid, signal.SIGINT)
        else:
            self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            # mlx.launch stays when the interrupt meets its lock. The ranks that it started must have ended.
            if not self.launched or self._ranks():
                raise
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
        self.log.close()


def history(i, n_turns=1):
    turns = []
    for turn in range(n_turns):
        turns.append({"role": "user", "content": f"Question {turn} of client {i}: " + f"{i} times {turn}? " * (i % 5 + 1)})
        turns.append({"role": "assistant", "content": f"Answer {i + turn}."})
    return turns[:-1]
