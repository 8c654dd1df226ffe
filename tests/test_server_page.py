"""What the server tells: its models, its numbers, its page, its log."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server_support import Server
from support import tool
from tiny import make_llama, save_chat_folder
from tqext import get_policy
from tqext.commands.metrics import COUNTERS, GAUGES

LAYERS, HEADS, DIM = 3, 2, 64
TEXT = "The seventh number is not the eighth. " * 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Started in the folder above the model's, by a relative name, without any hub folder."""
    home = tmp_path_factory.mktemp("home")
    save_chat_folder(make_llama(), home / "tiny")
    before, place = dict(os.environ), os.getcwd()
    os.environ["HF_HUB_CACHE"] = str(home / "no" / "hub")
    os.chdir(home)
    try:
        server = Server(home / "tiny", "--kv", "tq3", "--prompt-cache-size", "2", named="tiny")
    finally:
        os.chdir(place)
        os.environ.clear()
        os.environ.update(before)
    yield server
    server.close()


def get(server, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=30) as reply:
        return reply.headers["Content-Type"], reply.read().decode()


def metrics(server):
    families = text_string_to_metric_families(get(server, "/metrics")[1])
    return {(s.name, s.labels.get("where")): s.value for family in families for s in family.samples}


def test_models_are_listed_without_a_hub_folder(server):
    listed = json.loads(get(server, "/v1/models")[1])
    assert listed["object"] == "list"
    names = [entry["id"] for entry in listed["data"]]
    assert names[0] == "tiny"
    assert json.loads(get(server, "/v1/models/tiny")[1])["data"][0]["id"] == "tiny"


def test_the_name_of_the_command_line_is_accepted(server):
    messages = [{"role": "user", "content": "Hello"}]
    answers = {server.answer(messages, model=name, max_tokens=5) for name in ("tiny", "default_model")}
    assert len(answers) == 1
    assert server.chat(messages, model="tiny", max_tokens=2)["model"] == "tiny"


def test_metrics_count_requests_tokens_and_bytes(server):
    before = metrics(server)
    messages = [{"role": "user", "content": TEXT}]
    first = server.chat(messages, model="tiny", max_tokens=7)["usage"]
    after = metrics(server)

    def grown(name):
        return after[f"tqext_{name}_total", None] - before[f"tqext_{name}_total", None]

    assert grown("requests") == 1
    assert grown("prompt_tokens") == first["prompt_tokens"]
    assert grown("generated_tokens") == first["completion_tokens"] == 7
    assert grown("prompt_cache_hits") + grown("prompt_cache_misses") == 1
    server.chat([*messages, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}], model="tiny")
    assert metrics(server)["tqext_reused_tokens_total", None] - after["tqext_reused_tokens_total", None] > 500
    assert metrics(server)["tqext_prompt_cache_hits_total", None] == after["tqext_prompt_cache_hits_total", None] + 1


def test_metrics_are_the_bytes_of_the_kept_caches(server):
    """Two different prompts throw all earlier ones away."""
    before = metrics(server)
    for i in range(2):
        server.chat([{"role": "user", "content": f"{i}{TEXT}"}], model="tiny", max_tokens=3)
    now = metrics(server)
    n = {name: now[f"tqext_cache_{name}", "kept"] for name, _ in GAUGES.values()}
    assert n["sequences"] == 2
    assert now["tqext_prompt_cache_evictions_total", None] > before["tqext_prompt_cache_evictions_total", None]
    assert n["coded_tokens"] % 64 == 0
    assert 0 < n["exact_tokens"] < n["coded_tokens"]
    per_token = LAYERS * HEADS * 2 * DIM * 2
    assert n["fp16_equivalent_bytes"] == (n["coded_tokens"] + n["exact_tokens"]) * per_token
    coded = LAYERS * HEADS * get_policy("tq3").recipe.bytes_per_block(DIM) * n["coded_tokens"] / 64
    assert n["used_bytes"] == coded + n["exact_tokens"] * 2 * per_token  # fp32
    assert n["reserved_bytes"] >= n["used_bytes"]


def test_the_batch_is_counted_while_it_runs(server):
    """Looked at while an answer comes."""
    body = server.request([{"role": "user", "content": TEXT}], stream=True, max_tokens=300, logit_bias={"256": -100})
    with urllib.request.urlopen(body, timeout=120) as reply:
        for _ in range(400):
            reply.readline()
            now = metrics(server)
            if now["tqext_cache_sequences", "running"]:
                break
        assert now["tqext_cache_sequences", "running"] == 1
        per_token = LAYERS * HEADS * 2 * DIM * 2
        held = now["tqext_cache_coded_tokens", "running"] + now["tqext_cache_exact_tokens", "running"]
        assert now["tqext_cache_fp16_equivalent_bytes", "running"] == held * per_token
        assert held > len(TEXT)
        assert now["tqext_tokens_per_second", None] > 0


def test_refused_requests_are_counted(server):
    before = metrics(server)["tqext_refused_requests_total", None]
    with pytest.raises(urllib.error.HTTPError):
        server.chat([{"role": "user", "content": "x"}], top_k=299_999)
    assert metrics(server)["tqext_refused_requests_total", None] == before + 1


def test_the_page_shows_what_is_measured(server):
    kind, page = get(server, "/")
    assert kind.startswith("text/html")
    stats = json.loads(get(server, "/stats")[1])
    assert stats["model"] == "tiny"
    assert set(stats["counters"]) == set(COUNTERS)
    assert set(stats["running"]) == set(stats["kept"]) == set(GAUGES)
    for name in re.findall(r"\bs\.(\w+)", page):
        assert name in stats, name
    for name in re.findall(r"\bh\.(\w+)", page):
        assert name in stats["kept"], name
    assert "http://" not in page and "https://" not in page  # nothing comes from elsewhere
    assert stats["points"]


def test_the_log_speaks_of_megabytes(server):
    server.chat([{"role": "user", "content": "log"}], max_tokens=2)
    assert re.search(
        r"Prompt cache: \d+ sequences, [\d.]+ MB of tokens in [\d.]+ MB of buffers, [\d.]+ MB in fp16", server.text()
    )
    assert "GB" not in server.text()


# In a browser


def rendered(url):
    """The page's text as a browser shows it: what the rows of every table say, and the text of every element with a name."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            tool("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"),
            *("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
            *("--virtual-time-budget=3000", "--dump-dom", url),  # of the page's own clock: one answer at least
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return Dom(done.stdout)


class Dom(HTMLParser):
    """Text by the id of the element that holds it, rows of tables by theirs, and the points of the curves."""

    def __init__(self, text):
        super().__init__()
        self.text, self.rows, self.curves, self.open = {}, {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        name = attributes.get("id") or (self.open[-1][1] if self.open else None)
        if tag == "polyline":
            self.curves.append(attributes["points"].split())
        elif tag == "tr":
            self.rows.setdefault(name, []).append([])
        elif tag in ("td", "th"):
            self.rows[name][-1].append("")
        if tag not in ("meta", "link"):
            self.open.append((tag, name))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if not self.open:
            return
        tag, name = self.open[-1]
        if tag in ("td", "th"):
            self.rows[name][-1][-1] += data
        elif name:
            self.text[name] = self.text.get(name, "") + data


linux = pytest.mark.skipif(sys.platform != "linux", reason="the browser of the tests is Debian's")


@linux
def test_a_browser_shows_the_numbers(server):
    server.chat([{"role": "user", "content": TEXT}], max_tokens=3)
    kept = json.loads(get(server, "/stats")[1])["kept"]
    page = rendered(f"http://127.0.0.1:{server.port}/")
    assert page.text["model"] == "tiny"
    used, fp16 = (f"{kept[name] / 1e6:.1f} MB" for name in ("used", "fp16"))
    assert page.text["saved"].startswith(f"All tokens take {used} instead of {fp16} in fp16: ")
    head, running, held = page.rows["held"]
    assert head == ["", "sequences", "coded tokens", "exact tokens", "used", "reserved", "in fp16"]
    assert running[1:4] == ["0", "0", "0"]
    assert held[1:5] == [str(kept[name]) for name in ("n_sequences", "n_coded", "n_exact")] + [used]
    counts = dict(page.rows["counts"][1:])
    assert int(counts["requests"]) >= 1
    assert int(counts["generated tokens"]) >= 3
    assert [len(points) for points in page.curves] == [len(page.curves[0])] * 2
    heights = [[float(point.split(",")[1]) for point in points] for points in page.curves]
    assert heights[0][-1] < heights[1][-1] < 200  # fp16's curve ends higher; heights count from the top
    assert page.text.get("error", "") == ""


@linux
def test_a_browser_says_when_the_server_does_not_answer(server, tmp_path):
    """The page comes from a server without `/stats`."""
    (tmp_path / "index.html").write_text(get(server, "/")[1])
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        page = rendered(f"http://127.0.0.1:{http.server_port}/")
        http.shutdown()
    assert page.text["error"] == "The server does not answer."


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass
