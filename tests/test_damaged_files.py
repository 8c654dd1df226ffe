"""Damaged files (hypothesis): loaders refuse them or give what was written, and never end the process."""

import json
import os
import shutil
import struct

import mlx.core as mx
import mlx_lm.models.cache as stock
import mlx_lm.utils
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import q1_models
import tqext.mlx_lm
from tqext import TurboQuantKVCache, nn, one_bit
from tqext import gguf as loader

# TQEXT_FUZZ=100000 tries as many other files as it says; without it the same 200 are tried every time.
EXAMPLES = int(os.environ.get("TQEXT_FUZZ", 0))
fuzz = settings(
    max_examples=EXAMPLES or 200,
    deadline=None,
    derandomize=not EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Good:
    """What a test damages. A class of its own, so that hypothesis does not print it."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


@st.composite
def damages(draw):
    """Changes of bytes: (what, where as a fraction, a number)."""
    what = draw(st.sampled_from(["bit", "bit", "digit", "byte", "insert", "cut", "length"]))
    return what, draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 2**64 - 1))


def damaged(data, damage, end):
    """The file with one change somewhere before `end`."""
    what, where, number = damage
    data, at = bytearray(data), int(where * end)
    if what == "bit":
        data[at] ^= 1 << number % 8
    elif what == "byte":
        data[at] = number % 256
    elif what == "digit":
        digits = [i for i in range(end) if chr(data[i]) in "0123456789"]
        data[digits[int(where * len(digits))]] = ord("0") + number % 10
    elif what == "insert":
        data[at:at] = bytes([number % 256])
    elif what == "cut":
        del data[at:]
    elif what == "length":  # of a safetensors header, or a GGUF's count of tensors
        data[8 * (data[:4] == b"GGUF") :][:8] = struct.pack("<Q", number >> number % 64)
    return bytes(data)


def header_end(data):
    return 8 + struct.unpack("<Q", data[:8])[0]


# ---- saved caches ---------------------------------------------------------------------------------


def make_caches():
    mx.random.seed(0)
    caches = [TurboQuantKVCache(balance=mx.full((2, 64), 2.0)), TurboQuantKVCache(tqext.Recipe(qjl=True, first=0, tail=30))]
    for cache in caches:
        cache.update_and_fetch(*mx.random.normal((2, 1, 2, 300, 64)))
    return caches


def arrays_of(caches):
    return [[np.array(x) for x in cache.state] for cache in caches]


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    caches = make_caches()
    tqext.mlx_lm.hook()
    stock.save_prompt_cache(str(folder / "good.safetensors"), caches, {"who": "test"})
    yield Good(folder=folder, data=(folder / "good.safetensors").read_bytes(), arrays=arrays_of(caches))
    tqext.uninstall()


@fuzz
@given(damage=damages(), anywhere=st.booleans())
def test_damaged_cache_files_are_refused(saved, damage, anywhere):
    """mlx and mlx-lm refuse what is no safetensors file in their own words; the rest is found by the checksum."""
    bad = saved.folder / "bad.safetensors"
    anywhere = anywhere and damage[0] != "digit"
    bad.write_bytes(damaged(saved.data, damage, len(saved.data) if anywhere else header_end(saved.data)))
    try:
        loaded = stock.load_prompt_cache(str(bad))
    except Exception as error:
        assert str(error)
        return
    assert_same(arrays_of(loaded), saved.arrays)


numbers = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 300)


@fuzz
@given(
    which=st.integers(0, 1),
    header=st.dictionaries(st.integers(0, 22), numbers, max_size=2),
    replaced=st.dictionaries(
        st.integers(0, 11),
        st.sampled_from([None, "text", {}, 3, mx.zeros(()), mx.zeros((1, 2, 128, 6), mx.uint32), mx.zeros((1, 2, 108, 64))]),
        max_size=1,
    ),
    dropped=st.sets(st.integers(0, 11), max_size=1),
)
def test_damaged_cache_states_are_value_errors(saved, which, header, replaced, dropped):
    want = saved.arrays[which]
    state = [mx.array(x) for x in want]
    for at, number in header.items():
        state[0][at] = number
    for at, other in replaced.items():
        state[at % len(state)] = other
    state = [x for i, x in enumerate(state) if i not in dropped]
    try:
        loaded = TurboQuantKVCache.from_state(state)
    except ValueError as error:
        assert str(error).startswith(("[TurboQuantKVCache] state: expected", "[policy]", "[quantize_")), error
        return
    assert_same(arrays_of([loaded]), [want])


# ---- GGUF -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    model, config = q1_models.make("qwen3")
    path = q1_models.write_gguf(folder / "good.gguf", model, config)
    loader.convert(path, folder / "good")
    begin = min(int(tensor.data_offset) for tensor in loader.read(path)[0].values())
    return Good(folder=folder, data=path.read_bytes(), begin=begin, weights=weights_of(folder / "good"))


def assert_weights(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def weights_of(folder):
    return {name: np.array(value) for name, value in mx.load(str(folder / "model.safetensors")).items()}


@fuzz
@given(damage=damages())
def test_damaged_gguf_files_are_value_errors(gguf_file, damage):
    """In the names, types, sizes, places and metadata; what is read in spite of it has the weights that were written."""
    bad, made = gguf_file.folder / "bad.gguf", gguf_file.folder / "made"
    bad.write_bytes(damaged(gguf_file.data, damage, gguf_file.begin))
    shutil.rmtree(made, ignore_errors=True)
    try:
        loader.convert(bad, made)
    except ValueError as error:
        assert str(error).startswith("[gguf] "), error
        return
    assert_weights(weights_of(made), gguf_file.weights)


# ---- 1-bit checkpoints ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of MLX's affine form and of the native one, their files, and the parameters."""
    out = {}
    settings = q1_models.config(num_hidden_layers=1)
    model = q1_models.make_affine(q1_models.make_model(settings))
    affine, native = (tmp_path_factory.mktemp(name) for name in ("affine", "native"))
    q1_models.write_affine(affine, settings, model)
    nn.from_quantized(model)
    one_bit.save(native, model, settings)
    one_bit.hook()
    want = {name: np.array(value) for name, value in q1_models.parameters(model)}
    for name, folder in (("affine", affine), ("native", native)):
        files = {file: (folder / file).read_bytes() for file in ("model.safetensors", "config.json")}
        out[name] = Good(folder=folder, files=files, weights=want)
    yield Good(**out)
    one_bit.unhook()


@settings(fuzz, max_examples=EXAMPLES or 80)
@given(kind=st.sampled_from(["affine", "native"]), damage=damages())
def test_damaged_checkpoints_are_refused(checkpoints, kind, damage):
    good = getattr(checkpoints, kind)
    data = good.files["model.safetensors"]
    (good.folder / "model.safetensors").write_bytes(damaged(data, damage, header_end(data)))
    try:
        model, _ = mlx_lm.utils.load_model(good.folder)
    except (ValueError, RuntimeError, KeyError) as error:
        assert str(error)
        return
    assert_weights({name: np.array(value) for name, value in q1_models.parameters(model)}, good.weights)


CHANGES = {
    "more layers": {"num_hidden_layers": 2},
    "fewer heads": {"num_attention_heads": 2},
    "smaller heads": {"head_dim": 32},
    "smaller model": {"hidden_size": 128},
    "smaller vocabulary": {"vocab_size": 100},
    "unknown form": {one_bit.CONFIG_KEY: {"format": "q1_0", "group_size": 64, "version": 1}},
}
ONLY = {
    "affine": {"not quantised": {"quantization": None}},
    "native": {"integers": {"torch_dtype": "int8", "dtype": "int8"}},
}


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind in ONLY for change in CHANGES | ONLY[kind]])
def test_checkpoints_of_another_config_are_refused(checkpoints, kind, change):
    good = getattr(checkpoints, kind)
    (good.folder / "model.safetensors").write_bytes(good.files["model.safetensors"])
    config = json.loads(good.files["config.json"]) | (CHANGES | ONLY[kind])[change]
    (good.folder / "config.json").write_text(json.dumps(config))
    try:
        with pytest.raises(ValueError, match=r"[Ee]xpected|parameters"):
            mx.eval(mlx_lm.utils.load_model(good.folder)[0](mx.array([[1, 2]])))
    finally:
        (good.folder / "config.json").write_bytes(good.files["config.json"])
