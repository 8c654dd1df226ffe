"""Saved caches: bit-exact, and a clear error for every file that is not one."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.cache as stock
import numpy as np
import pytest

import tqext
import tqext.mlx_lm
from tiny import greedy, logits_after, make_llama, prompt
from tqext import Recipe, TurboQuantKVCache, get_policy
from tqext.cache import STATE_MAGIC
from tqext.presets import PRESETS


@pytest.fixture(scope="module")
def model():
    return make_llama()


@pytest.fixture(autouse=True)
def hooked():
    tqext.mlx_lm.hook()
    yield
    tqext.uninstall()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("n_tokens", [2, 50, 300])
def test_state_survives_a_file_bit_for_bit(model, preset, n_tokens, tmp_path):
    """Codes, mean, first tokens, tail and recipe are the same, and so are the logits of what follows."""
    cache = tqext.make_prompt_cache(model, get_policy(preset, first_last=0))
    logits_after(model, cache, prompt(n_tokens))
    file = str(tmp_path / "cache.safetensors")
    stock.save_prompt_cache(file, cache, {"who": "test"})
    loaded, metadata = stock.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"who": "test"}
    for a, b in zip(cache, loaded, strict=True):
        assert type(b) is TurboQuantKVCache
        assert a.recipe == b.recipe
        assert (a.n_first, a.n_coded, a.n_tail, a.offset) == (b.n_first, b.n_coded, b.n_tail, b.offset)
        for x, y in zip(a.state, b.state, strict=True):
            assert x.dtype == y.dtype
            assert np.array_equal(np.array(x), np.array(y))
    for tokens in ([5], [6, 7, 8], prompt(70, seed=2), [9]):
        assert mx.array_equal(*(logits_after(model, c, tokens) for c in (cache, loaded)))


def test_state_of_an_empty_cache(tmp_path):
    file = str(tmp_path / "cache.safetensors")
    stock.save_prompt_cache(file, [TurboQuantKVCache(Recipe(tail=7))])
    (loaded,) = stock.load_prompt_cache(file)
    assert loaded.empty()
    assert loaded.recipe.tail == 7


def test_state_inside_a_cache_list(model, tmp_path):
    members = tqext.make_prompt_cache(model)[:2]
    for member in members:
        member.update_and_fetch(mx.random.normal((1, 2, 100, 64)), mx.random.normal((1, 2, 100, 64)))
    file = str(tmp_path / "cache.safetensors")
    stock.save_prompt_cache(file, [stock.CacheList(*members)])
    (loaded,) = stock.load_prompt_cache(file)
    for a, b in zip(members, loaded.caches, strict=True):
        assert all(mx.array_equal(x, y) for x, y in zip(a.state, b.state, strict=True))


@pytest.fixture
def arrays():
    cache = TurboQuantKVCache()
    cache.update_and_fetch(mx.random.normal((1, 2, 200, 64)), mx.random.normal((1, 2, 200, 64)))
    mx.eval(cache.state)
    return cache.state


def changed_header(arrays, at, value):
    header = np.array(arrays[0])
    header[at] = value
    return [mx.array(header), *arrays[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: changed_header(a, 0, STATE_MAGIC + 1), "expected a tqext cache, got arrays of something else"),
        (lambda a: changed_header(a, 1, 99), r"expected state and format versions \(1, 1\), got \(99, 1\)"),
        (lambda a: changed_header(a, 2, 2), r"expected state and format versions \(1, 1\), got \(1, 2\)"),
        (lambda a: changed_header(a, 3, 4), r"expected \(1, 2, 160, 8\) of .*uint32"),
        (lambda a: changed_header(a, 3, 7), r"key_bits: expected 2, 3 or 4, got 7"),
        (lambda a: changed_header(a, 6, 9), "expected a known rotation, got 9"),
        (lambda a: changed_header(a, 15, 100), r"expected \(1, 2, 100, 6\)"),
        (lambda a: changed_header(a, 15, -1), "expected counts of tokens"),
        (lambda a: [a[0][:9], *a[1:]], "expected a header of 18 numbers, got 9"),
        (lambda a: a[:5], "expected 10 arrays, got 5"),
        (lambda a: a[:1], "expected no tokens without arrays"),
        (lambda a: [*a, a[-1]], "expected 10 arrays, got 11"),
        (lambda a: [*a[:6], a[6][:, :, :-1], *a[7:]], r"expected \(1, 2, 160, 6\)"),
        (lambda a: [*a[:7], a[7].astype(mx.float32), *a[8:]], "of mlx.core.float32"),
        (lambda a: [*a[:4], a[4][0], *a[5:]], "expected tail keys with 4 axes"),
        (lambda a: a[1:], "expected an int32 header first"),
        (lambda a: [], "expected a list of arrays"),
        (lambda a: "text", "expected a list of arrays"),
    ],
)
def test_state_that_is_not_a_caches_is_refused(arrays, change, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantKVCache.from_state(change(arrays))


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(model, kept, tmp_path):
    cache = tqext.make_prompt_cache(model)
    logits_after(model, cache, prompt(200))
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    stock.save_prompt_cache(str(whole), cache)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises((RuntimeError, ValueError)):
        stock.load_prompt_cache(str(cut))


def test_a_foreign_class_of_file_is_refused(model, tmp_path):
    """The arrays of mlx-lm's own cache under our class name."""
    file = str(tmp_path / "cache.safetensors")
    cache = [stock.KVCache() for _ in range(3)]
    logits_after(model, cache, prompt(20))
    stock.save_prompt_cache(file, cache)
    data, metadata = mx.load(file, return_metadata=True)
    renamed = {k: "TurboQuantKVCache" if v == "KVCache" else v for k, v in metadata.items()}
    mx.save_safetensors(file, data, renamed)
    with pytest.raises(ValueError, match="expected a list of arrays, got one with int in it"):
        stock.load_prompt_cache(file)


def test_a_prompt_cache_goes_on_as_without_a_file(model, tmp_path):
    """cache_prompt, then generate: the answer of one run."""
    tokens = prompt(200)
    through, straight = (tqext.make_prompt_cache(model) for _ in range(2))
    for cache in (through, straight):
        logits_after(model, cache, tokens[:150])
    file = str(tmp_path / "cache.safetensors")
    stock.save_prompt_cache(file, through)
    loaded = stock.load_prompt_cache(file)
    assert greedy(model, tokens[150:], 80, cache=loaded) == greedy(model, tokens[150:], 80, cache=straight)


@pytest.mark.parametrize("version", ["0.31.3", "0.32.0", "0.32.2"])
def test_other_versions_of_mlx_lm(version, tmp_path):
    """Generation, batches, drafts, files and the proof, with that version alone on the path."""
    target = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), f"mlx-lm=={version}"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    script = Path(__file__).with_name("other_mlx_lm.py")
    run = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(target)!r}, {str(script.parent)!r}]; import other_mlx_lm"]
    done = subprocess.run([*run, version, str(tmp_path / "cache.safetensors")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"mlx-lm {version}: all passed" in done.stdout
