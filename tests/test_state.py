"""Saved caches: bit-exact, and a clear error for every file that is not one."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.cache as stock
import numpy as np
import pytest
from tqext._ext import word_sum

import tqext
import tqext.mlx_lm
from tiny import greedy, logits_after, make_llama, prompt
from tqext import Recipe, TurboQuantKVCache, get_policy
from tqext.cache import STATE_MAGIC
from tqext.kv import state
from tqext.kv.state import checksum
from tqext.kv.tokens import Store, stored
from tqext.presets import PRESETS


@pytest.fixture(scope="module")
def model():
    return make_llama()


@pytest.fixture(autouse=True)
def hooked():
    tqext.mlx_lm.hook()
    yield
    tqext.uninstall()


def balance_of(recipe, n_kv_heads=2, head_dim=64):
    factors = np.random.default_rng(3).uniform(0.5, 2, (n_kv_heads, head_dim)).astype(np.float32)
    return mx.array(factors) if recipe.balance else None


@pytest.mark.covering
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("n_tokens", [2, 50, 300])
def test_state_survives_a_file_bit_for_bit(model, preset, n_tokens, tmp_path):
    """Codes, balance, exact tokens and recipe are the same, and so are the logits of what follows."""
    policy = get_policy(preset, first_last=0, guard=False)
    cache = [TurboQuantKVCache(c.recipe, balance=balance_of(c.recipe)) for c in tqext.make_prompt_cache(model, policy)]
    logits_after(model, cache, prompt(n_tokens))
    file = str(tmp_path / "cache.safetensors")
    stock.save_prompt_cache(file, cache, {"who": "test"})
    loaded, metadata = stock.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"who": "test"}
    for a, b in zip(cache, loaded, strict=True):
        assert type(b) is TurboQuantKVCache
        assert a.recipe == b.recipe
        assert (a.n_first, a.n_coded, a.n_tail, a.offset) == (b.n_first, b.n_coded, b.n_tail, b.offset)
        assert (a.balance is None) == (b.balance is None)
        for x, y in zip(a.state, b.state, strict=True):
            assert x.dtype == y.dtype
            assert np.array_equal(np.array(x), np.array(y))
    for tokens in ([5], [6, 7, 8], prompt(70, seed=2), [9]):
        assert mx.array_equal(*(logits_after(model, c, tokens) for c in (cache, loaded)))


@pytest.mark.parametrize("balance", [None, mx.full((2, 64), 2.0)])
def test_state_of_an_empty_cache(balance, tmp_path):
    """One that never had a token, and one that lost all."""
    trimmed = TurboQuantKVCache(Recipe(tail=7), balance=balance)
    trimmed.update_and_fetch(mx.random.normal((1, 2, 300, 64)), mx.random.normal((1, 2, 300, 64)))
    trimmed.trim(300)
    file = str(tmp_path / "cache.safetensors")
    stock.save_prompt_cache(file, [TurboQuantKVCache(Recipe(tail=7), balance=balance), trimmed])
    for loaded in stock.load_prompt_cache(file):
        assert loaded.empty()
        assert loaded.recipe.tail == 7
        assert (loaded.balance is None) == (balance is None)
        loaded.update_and_fetch(mx.ones((1, 2, 3, 64)), mx.ones((1, 2, 3, 64)))


@pytest.mark.parametrize("n_tokens", [20, 300])
def test_state_that_went_through_numpy(n_tokens):
    """Also where arrays are empty."""
    cache = TurboQuantKVCache()
    cache.update_and_fetch(mx.random.normal((1, 2, n_tokens, 64)), mx.random.normal((1, 2, n_tokens, 64)))
    loaded = TurboQuantKVCache.from_state([mx.array(np.array(x)) for x in cache.state])
    assert all(mx.array_equal(a, b) for a, b in zip(cache.state, loaded.state, strict=True))


@pytest.mark.parametrize("steps", [(300,), (300, 1, 500, 40), (1,) * 40, (2000, -700, 130), (400, -300, 300, -10, 500)])
def test_checksum_grows_with_the_cache(steps):
    """However often it was asked for, it is that of the arrays: of long chunks, short steps and trims."""
    cache = TurboQuantKVCache(Recipe(tail=3, first=2), balance=balance_of(Recipe()))
    for n in steps:
        if n < 0:
            cache.trim(-n)
        else:
            cache.update_and_fetch(mx.random.normal((1, 2, n, 64)), mx.random.normal((1, 2, n, 64)))
        header, *arrays = cache.state
        assert mx.array_equal(header[-1:].view(mx.uint32), checksum(header.tolist()[:-1], arrays))


def columns(x):
    """The same numbers with the token axis outermost."""
    return mx.swapaxes(mx.contiguous(mx.swapaxes(x, 1, 2)), 1, 2)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("shape", [(2, 3, 64, 12), (1, 1, 1, 1), (2, 3, 5, 7), (1, 8, 100, 128), (1, 2, 3000, 48)])
def test_words_are_summed_as_by_mlx(shape, rng):
    """One operation and those of the specification, over every kind of array that a state has."""
    bits = mx.array(rng.integers(0, 2**32, (2, *shape), dtype=np.uint32))
    numbers = [1, -5, 70000, 2**31 - 1]
    assert state._composed_sum([mx.array(numbers, mx.int32)], first=0).item() == state._number_sum(tuple(numbers))
    for dtype in (mx.uint32, mx.float32, mx.float16, mx.bfloat16):
        arrays = [bits[i] if dtype == mx.uint32 else (bits[i] % 1000).astype(dtype) for i in range(2)]
        for layout in (lambda x: x, columns, lambda x: mx.concatenate([x, x], axis=2)[:, :, : shape[2]]):
            laid = [layout(x) for x in arrays]
            start = [3 * shape[2], shape[2]]
            want = state._composed_sum(arrays, start, 4)
            assert mx.array_equal(word_sum(laid, start, 4, 5, mx.array([7], mx.uint32)), want + 12)
            found = word_sum([*laid, bits[0, :0]], start, 4, 0, None, numbers)
            assert found.tolist() == [*numbers, want.view(mx.int32).item()]
    balance = mx.random.normal((3, 64))
    assert mx.array_equal(word_sum([balance], [], 9, 0, None), state._composed_sum([balance], first=9))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [mx.uint32, mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("last", [1, 2, 12, 80])
def test_tokens_are_stored_as_by_mlx(dtype, last, rng):
    """In one operation for all arrays: cut at both ends, joined, with room and without."""
    x, y = (mx.array(rng.integers(0, 1000, (2, 3, n, last))).astype(dtype) for n in (37, 21))
    longer = mx.concatenate([x, x], axis=2)
    stores = [
        Store(x, 5, 30, None, 30),
        Store(x, 5, 30, None, 48),
        Store(x, 0, 37, y, 58),
        Store(x, 3, 20, y, 64),
        Store(x, 0, 0, y, 21),
        Store(columns(x), 3, 20, columns(y), 64),
        Store(longer[:, :, :37], 0, 33, longer[:, :, 40:43], 40),
        Store(x, 7, 0, None, 9),
        Store(x, 0, 0, None, 0),
    ]
    for store, got in zip(stores, stored(stores), strict=True):
        tokens = [store.buffer[:, :, store.begin : store.begin + store.kept]]
        tokens += [] if store.added is None else [store.added]
        n = sum(part.shape[2] for part in tokens)
        want = mx.concatenate([*tokens, mx.zeros((2, 3, store.room - n, last), dtype)], axis=2)
        assert got.dtype == dtype and mx.array_equal(got, want)


def test_a_batch_is_not_saved(tmp_path):
    """mlx-lm refuses it, with the way out."""
    caches = [TurboQuantKVCache() for _ in range(2)]
    for cache in caches:
        cache.update_and_fetch(mx.random.normal((1, 2, 300, 64)), mx.random.normal((1, 2, 300, 64)))
    batch = TurboQuantKVCache.merge(caches)
    mx.eval(batch.state)
    with pytest.raises(ValueError, match=r"save the cache of each sequence, batch\.extract\(i\)"):
        stock.save_prompt_cache(str(tmp_path / "cache.safetensors"), [batch])


def test_state_inside_a_cache_list(model, tmp_path):
    members = tqext.make_prompt_cache(model)[:2]
    for member in members:
        member.update_and_fetch(mx.random.normal((1, 2, 300, 64)), mx.random.normal((1, 2, 300, 64)))
    file = str(tmp_path / "cache.safetensors")
    stock.save_prompt_cache(file, [stock.CacheList(*members)])
    (loaded,) = stock.load_prompt_cache(file)
    for a, b in zip(members, loaded.caches, strict=True):
        assert all(mx.array_equal(x, y) for x, y in zip(a.state, b.state, strict=True))


@pytest.fixture
def arrays():
    """64 first tokens, 128 coded, 108 recent ones; the balance last."""
    cache = TurboQuantKVCache(balance=balance_of(Recipe()))
    cache.update_and_fetch(mx.random.normal((1, 2, 300, 64)), mx.random.normal((1, 2, 300, 64)))
    mx.eval(cache.state)
    return cache.state


def changed_header(arrays, at, value):
    header = np.array(arrays[0])
    header[at] = value
    return [mx.array(header), *arrays[1:]]


def with_(arrays, at, array):
    return [*arrays[:at], array, *arrays[at + 1 :]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: changed_header(a, 0, STATE_MAGIC + 1), "expected a tqext cache, got arrays of something else"),
        (lambda a: changed_header(a, 1, 1), r"expected state and format versions \(2, 2\), got \(1, 2\)"),
        (lambda a: changed_header(a, 2, 1), r"expected state and format versions \(2, 2\), got \(2, 1\)"),
        (lambda a: changed_header(a, 3, 4), r"expected \(1, 2, 128, 8\) of .*uint32"),
        (lambda a: changed_header(a, 3, 7), r"key_bits: expected 2, 3 or 4, got 7"),
        (lambda a: changed_header(a, 5, 2), "expected flags of 0 or 1"),
        (lambda a: changed_header(a, 6, 9), "expected a known rotation, got 9"),
        (lambda a: changed_header(a, 7, 0), "expected 9 arrays after the header, got 10"),
        (lambda a: changed_header(a, 9, 50), "expected the first 50 tokens exact, got 64 of 300"),
        (lambda a: changed_header(a, 10, 5), "expected a known value coding, got 5"),
        (lambda a: changed_header(a, 14, 63), "expected the first 64 tokens exact, got 63 of 299"),
        (lambda a: changed_header(a, 15, 192), r"expected \(1, 2, 192, 6\)"),
        (lambda a: changed_header(a, 15, 100), "expected whole blocks of 64 coded tokens, got 100"),
        (lambda a: changed_header(a, 15, -64), "expected counts of tokens"),
        (lambda a: changed_header(a, 16, 1000), "expected at most 191 recent tokens, got 1000"),
        (lambda a: changed_header(a, 17, 1 << 30), r"expected \(1, 1073741824, 128, 6\)"),
        (lambda a: changed_header(a, 18, 0), "expected no balance with a recipe without"),
        (lambda a: changed_header(a, 19, 0), "expected 9 arrays after the header, got 10"),
        (lambda a: changed_header(a, 20, 100), "expected a bound of at least 256 tokens, got 100"),
        (lambda a: changed_header(a, 20, -1), "expected a bound of at least 256 tokens, got -1"),
        (lambda a: changed_header(a, 21, 64), "expected dropped tokens if bounded, got 64"),
        (lambda a: changed_header(changed_header(a, 20, 500), 21, 65), "expected whole blocks of 64 dropped tokens, got 65"),
        (lambda a: with_(a, 0, a[0][:9]), "expected a header of 23 numbers, got 9"),
        (lambda a: a[:5], "expected 10 arrays after the header, got 4"),
        (lambda a: a[:1], "expected 10 arrays after the header, got 0"),
        (lambda a: [*a, a[-1]], "expected 10 arrays after the header, got 11"),
        (lambda a: with_(a, 1, a[1][:, :, :-1]), r"expected \(1, 2, 128, 6\)"),
        (lambda a: with_(a, 5, a[5][:, :, :-1]), r"expected \(1, 2, 2, 64\)"),
        (lambda a: with_(a, 2, a[2].astype(mx.float32)), "of mlx.core.float32"),
        (lambda a: with_(a, 8, a[8][0]), r"expected \(1, 2, 108, 64\)"),
        (lambda a: with_(a, 8, a[8].astype(mx.int32)), "expected recent tokens of a float type"),
        (lambda a: with_(a, 10, a[10][:1]), r"expected \(2, 64\) of .*float32"),
        (lambda a: a[1:], "expected an int32 header first"),
        (lambda a: [], "expected a list of arrays"),
        (lambda a: "text", "expected a list of arrays"),
    ],
)
def test_state_that_is_not_a_caches_is_refused(arrays, change, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantKVCache.from_state(change(arrays))


def forged(arrays, changes):
    """A state with these arrays in place of its own, and a checksum that is right."""
    for at, array in changes.items():
        arrays = with_(arrays, at, array)
    header = arrays[0].tolist()[:-1]
    return [mx.concatenate([mx.array(header, mx.int32), checksum(header, arrays[1:]).view(mx.int32)]), *arrays[1:]]


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_balance_that_divides_by_nothing_is_refused(arrays, value):
    balance = np.array(arrays[10])
    balance[1, 5] = value
    assert TurboQuantKVCache.from_state(forged(arrays, {})).offset == 300
    with pytest.raises(ValueError, match="expected a balance of positive numbers"):
        TurboQuantKVCache.from_state(forged(arrays, {10: mx.array(balance)}))


DAMAGES = {
    "tokens exchanged": lambda x: x[:, :, ::-1],
    "heads exchanged": lambda x: x[:, ::-1],
    "halves exchanged": lambda x: np.concatenate(np.split(x, 2, axis=2)[::-1], axis=2),
    "one bit": lambda x: changed_words(x, [(0, 1 << 5)]),
    "bit 31 of two words": lambda x: changed_words(x, [(0, 1 << 31), (1, 1 << 31)]),
    "bit 31 of two words far apart": lambda x: changed_words(x, [(0, 1 << 31), (77, 1 << 31)]),
    "a bit moved": lambda x: moved_bit(x),
}


def changed_words(x, changes):
    x = x.copy()
    words = x.view(np.uint32).reshape(-1)
    for at, bits in changes:
        words[at] ^= np.uint32(bits)
    return x


def moved_bit(x):
    """A bit that is set in one word and not in another, exchanged."""
    words = x.copy().view(np.uint32).reshape(-1)
    is_set, is_clear = (int(np.flatnonzero((words & 1) == bit)[0]) for bit in (1, 0))
    return changed_words(x, [(is_set, 1), (is_clear, 1)])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("at", [1, 3, 5, 6, 9])
def test_damage_that_a_sum_does_not_see_is_refused(arrays, at, damage):
    """In codes of keys and of values, means, first and recent tokens."""
    bad = DAMAGES[damage](np.array(arrays[at]))
    assert not np.array_equal(bad, np.array(arrays[at]))
    with pytest.raises(ValueError, match=r"expected arrays with the checksum .* \(the file is damaged\)"):
        TurboQuantKVCache.from_state(with_(arrays, at, mx.array(np.ascontiguousarray(bad))))


def test_arrays_exchanged_are_refused(arrays):
    for a, b in ((6, 6 + 1), (8, 8 + 1)):
        exchanged = with_(with_(arrays, a, arrays[b]), b, arrays[a])
        with pytest.raises(ValueError, match="the file is damaged"):
            TurboQuantKVCache.from_state(exchanged)


@pytest.mark.parametrize("sizes", [{8: 1 << 20}, {9: 1 << 20}, {13: 1 << 30, 17: 1 << 30}, {11: 1 << 30, 12: 1 << 30}])
def test_a_small_state_never_asks_for_much_memory(sizes):
    """Nothing is made room for that the arrays do not hold."""
    header = TurboQuantKVCache().state[0].tolist()[:-1]
    for at, n in sizes.items():
        header[at] = n
    state = [mx.concatenate([mx.array(header, mx.int32), checksum(header, []).view(mx.int32)])]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    cache = TurboQuantKVCache.from_state(state)
    cache.update_and_fetch(mx.ones((1, 2, 3, 64)), mx.ones((1, 2, 3, 64)))
    mx.eval(cache.state)
    assert mx.get_peak_memory() - before < 1 << 20
    assert cache.nbytes < 1 << 14


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(model, kept, tmp_path):
    cache = tqext.make_prompt_cache(model)
    logits_after(model, cache, prompt(300))
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


LOAD = """
import sys
from mlx_lm.models.cache import load_prompt_cache
try:
    load_prompt_cache(sys.argv[1])
except KeyError as error:
    print(error)
import tqext
tqext.install()
print([type(c).__name__ for c in load_prompt_cache(sys.argv[1])])
"""


def test_a_file_names_tqext_where_it_is_not_installed(model, tmp_path):
    """Also of a cache within a list of mlx-lm's; with tqext it is the class that was saved."""
    cache = tqext.make_prompt_cache(model)
    logits_after(model, cache, prompt(200))
    for name, saved in (("plain", cache), ("list", [stock.CacheList(*cache)])):
        file = str(tmp_path / f"{name}.safetensors")
        stock.save_prompt_cache(file, saved)
        done = subprocess.run([sys.executable, "-c", LOAD, file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        error, loaded = done.stdout.splitlines()[-2:]
        assert error == "'TurboQuantKVCache of tqext: call tqext.install() before load_prompt_cache'"
        assert loaded == str([type(c).__name__ for c in saved])


def test_a_file_that_was_saved_without_the_hook_is_read(model, tmp_path):
    """Its name is that of the class."""
    cache = tqext.make_prompt_cache(model)
    logits_after(model, cache, prompt(100))
    file = str(tmp_path / "cache.safetensors")
    stock.save_prompt_cache.__wrapped__(file, cache)
    assert "TurboQuantKVCache" in mx.load(file, return_metadata=True)[1].values()
    assert [type(c).__name__ for c in stock.load_prompt_cache(file)] == ["TurboQuantKVCache"] * len(cache)


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
