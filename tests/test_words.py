"""What Python shows and says: names, reprs, and messages for arguments of the wrong kind."""

import dataclasses
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

import tqext
from tiny import make_llama
from tqext import BatchTurboQuantKVCache, Recipe, TurboQuantKVCache

pytestmark = pytest.mark.usefixtures("uninstalled")


def test_dir_names_everything_and_nothing_else():
    public = {name for name in dir(tqext) if not name.startswith("__")}
    assert public == {name for name in tqext.__all__ if not name.startswith("__")}
    assert {"install", "attach", "verify", "PRESETS", "TurboQuantKVCache"} <= public
    for name in tqext.__all__:
        assert getattr(tqext, name) is not None


def random(*shape):
    return mx.random.normal(shape)


def test_reprs_are_one_line():
    keys, values = tqext.quantize_keys(random(1, 2, 100, 64)), tqext.quantize_values(random(1, 2, 100, 64))
    assert repr(keys) == f"PackedKeys((1, 2, 100, 64), 3 bits, {keys.nbytes} bytes)"
    assert repr(values) == f"PackedValues((1, 2, 100, 64), 2 bits, groups, {values.nbytes} bytes)"
    assert keys.shape == values.shape == (1, 2, 100, 64)
    assert repr(keys._replace(codes=None)).startswith("PackedKeys(")  # as tree_map may leave it
    cache = TurboQuantKVCache()
    assert repr(cache) == "TurboQuantKVCache(K3 V2, empty)"
    cache.update_and_fetch(random(1, 2, 300, 64), random(1, 2, 300, 64))
    coded, plain = cache.used_nbytes, 300 * 2 * 64 * 2 * 2
    size = f"{coded / 1e6:.2f} MB, {plain / 1e6:.2f} MB in fp16"
    assert repr(cache) == f"TurboQuantKVCache(K3 V2, 128 coded and 172 exact tokens, {size})"
    batch = BatchTurboQuantKVCache([0, 5])
    batch.update_and_fetch(random(2, 2, 20, 64), random(2, 2, 20, 64))
    assert repr(batch).startswith("BatchTurboQuantKVCache(K3 V2, 2 sequences, 0 coded and 35 exact tokens")


def test_a_report_is_a_table_in_notebooks():
    report = tqext.probe(make_llama(), "tq3", layers={1: None})
    assert repr(report).startswith("<Report tq3: 2 of 3 layers compressed")
    html = report._repr_html_()
    assert html.count("<table>") == 1
    assert "<td>0, 2</td><td>K3 V2</td>" in html
    assert "<td>1</td><td>KVCache</td>" in html
    assert "left out by the policy" in html
    assert "<td>0-2</td>" in tqext.probe(make_llama())._repr_html_()


TOKENS = np.zeros((1, 2, 64, 64), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tqext.install(None), r"preset: expected a preset's name or a Policy, got None"),
        (lambda: tqext.install(3), r"preset: expected a preset's name or a Policy, got 3"),
        (lambda: tqext.install("none"), r"tqext.uninstall\(\) or tqext.detach\(model\)"),
        (lambda: tqext.attach("smollm2"), r"got 'smollm2': model, tokenizer = tqext.load\('smollm2'\) loads it"),
        (lambda: tqext.attach((1, 2)), r"got a tuple: model, tokenizer = tqext.load"),
        (lambda: tqext.attach(None), r"model: expected a model of mlx.nn, got NoneType"),
        (lambda: tqext.detach("smollm2"), r"\[detach\] model: expected"),
        (lambda: tqext.probe("smollm2"), r"\[probe\] model: expected a model, got 'smollm2'"),
        (lambda: tqext.verify(None), r"\[probe\] model: expected a model, got NoneType"),
        (lambda: tqext.calibrate("smollm2"), r"\[probe\] model: expected a model, got 'smollm2'"),
        (lambda: tqext.make_prompt_cache("smollm2"), r"\[make_prompt_cache\] model: expected a model, got 'smollm2'"),
        (lambda: tqext.upgrade(KVCache()), r"\[upgrade\] cache: expected a list of caches, got KVCache"),
        (lambda: tqext.load(None), r"\[load\] name: expected a folder"),
        (lambda: tqext.quantize_keys(TOKENS), r"k: expected an mlx.core.array, got ndarray; mx.array\(k\) converts it"),
        (lambda: tqext.quantize_keys(random(1, 2, 64, 64), means=TOKENS), r"means: expected an mlx.core.array, got ndarray"),
        (lambda: tqext.quantize_values(None), r"\[quantize_values\] v: expected an mlx.core.array, got None"),
        (lambda: tqext.rotate([1.0] * 32), r"\[rotate\] x: expected an mlx.core.array, got list"),
    ],
)
def test_wrong_kinds_are_told_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["q", "mask", "sinks", "tail", "first", "lengths"])
def test_attention_names_the_argument_that_is_no_array(name):
    q, k, v = (random(1, 2, n, 64) for n in (1, 64, 64))
    wrong = (TOKENS, TOKENS) if name in ("tail", "first") else np.zeros((1, 2, 1, 64), np.float32)
    arguments = {"q": q} | {name: wrong}
    with pytest.raises(ValueError, match=rf"\[turboquant_attention\] {name}: expected an mlx.core.array, got ndarray"):
        tqext.turboquant_attention(packed_k=tqext.quantize_keys(k), packed_v=tqext.quantize_values(v), **arguments)


ROOT = Path(__file__).resolve().parents[1]


def texts():
    """What users read, except the glossary; a wheel's tests come without."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "python").rglob("*.py")]
    return {file: file.read_text() for file in files if file.name != "glossary.md"}


def test_the_glossary_has_every_part_of_a_recipe():
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    terms = re.findall(r"^\| \*\*(.+?)\*\*", glossary, re.MULTILINE)
    assert len(terms) == len(set(terms)) > 15
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", glossary))))
    assert {field.name for field in dataclasses.fields(Recipe)} <= named
    assert {f"n_{part}" for part in ("first", "coded", "tail", "exact")} <= named


@pytest.mark.parametrize("word", ["residual window", "sink token", "exact window", "token block"])
def test_what_others_call_it_is_said_in_the_glossary_alone(word):
    assert len(texts()) > 50
    assert not [file.name for file, text in texts().items() if word in text.lower()]
