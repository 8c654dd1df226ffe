"""GGUF files with ternary tensors: every type compared with a reference from its specification, and what is made of it."""

import gguf
import mlx.core as mx
import mlx.nn
import numpy as np
import pytest

import q1_models
import reference
import tqext
from support import assert_close, to_numpy
from tqext import gguf as loader
from tqext import one_bit
from tqext.one_bit import gguf_file, ternary

# Weights in a block, and in a group that shares a scale.
SIZES = {"TQ1_0": 256, "TQ2_0": 256, "Q2_0": 64, "OLD_Q2_0": 128, "PQ2_0": 128, "PTQ1_0": 128}
NUMBERS = {"TQ1_0": 34, "TQ2_0": 35, "Q2_0": 42, "OLD_Q2_0": 42, "PQ2_0": 142, "PTQ1_0": 143}
TYPES = {**{name: ternary.TYPES[number] for name, number in NUMBERS.items()}, "OLD_Q2_0": ternary.OLD_Q2_0}


@pytest.fixture(autouse=True)
def unhooked(monkeypatch, tmp_path):
    monkeypatch.setenv("TQEXT_CACHE", str(tmp_path / "cache"))
    yield
    one_bit.unhook()


def trit_bytes(codes, places, n_bytes):
    """Bytes whose base-3 digits are these codes: `places` gives (byte, digit), digit 0 the highest of five."""
    number = [0] * n_bytes
    for code, (byte, digit) in zip(codes, places, strict=True):
        number[byte] += int(code) * 3 ** (4 - digit)
    return bytes((256 * n + 242) // 243 for n in number)  # n / 243 as a fraction of 256, rounded up


def trit_places(runs, tail):
    """Where the weights of a block are: runs of bytes with five digits each, then `tail` bytes with four."""
    at, places = 0, []
    for run, digits in [*((run, 5) for run in runs), (tail, 4)]:
        places += [(at + byte, digit) for digit in range(digits) for byte in range(run)]
        at += run
    return places


def block(name, codes, scale):
    """One block, written weight by weight as ggml-quants.c describes it."""
    d = np.float16(scale).astype("<f2").tobytes()
    if name == "PTQ1_0":
        return trit_bytes(codes, trit_places([16, 8], 2), 26) + d
    if name == "TQ1_0":
        return trit_bytes(codes, trit_places([32, 16], 4), 52) + d
    data = bytearray(SIZES[name] // 4)
    for i, code in enumerate(codes):
        if name == "TQ2_0":  # 128 weights in 32 bytes, four planes of 32
            byte, place = i // 128 * 32 + i % 32, i % 128 // 32
        else:
            byte, place = i // 4, i % 4
        data[byte] |= int(code) << 2 * place
    return bytes(data) + d if name == "TQ2_0" else d + bytes(data)


def random_matrix(name, rows, columns, rng, n_codes=3):
    """Blocks of a random ternary matrix, and its values."""
    size = SIZES[name]
    codes = rng.integers(0, n_codes, (rows, columns))
    scales = rng.uniform(0.01, 0.1, (rows, columns // size)).astype(np.float16)
    values = (codes - 1) * np.repeat(scales, size, axis=1).astype(np.float64)
    data = [
        b"".join(block(name, codes[i, g * size : (g + 1) * size], scales[i, g]) for g in range(columns // size))
        for i in range(rows)
    ]
    return np.stack([np.frombuffer(row, np.uint8) for row in data]), values


@pytest.mark.parametrize("name", SIZES)
def test_unpacked_blocks_are_the_weights(name):
    # Code 3, twice the scale, is in the formats with bits and not in those with digits.
    n_codes = 3 if name in ("TQ1_0", "PTQ1_0") else 4
    data, values = random_matrix(name, 5, 768, np.random.default_rng(0), n_codes)
    codes, scales = ternary.unpack(data, TYPES[name])
    np.testing.assert_array_equal(ternary.dequantize(codes, scales), values)
    words = mx.array(ternary.pack(codes))
    scale = mx.array(scales).astype(mx.float32)
    decoded = mx.dequantize(words, scale, -scale, group_size=TYPES[name].group, bits=2)
    np.testing.assert_array_equal(to_numpy(decoded), values)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_unpacked_blocks_are_what_the_gguf_package_decodes(name):
    data, values = random_matrix(name, 3, 512, np.random.default_rng(1))
    np.testing.assert_array_equal(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]), values)
    # Any bytes at all, also those that no encoder writes.
    noise = np.random.default_rng(2).integers(0, 256, data.shape).astype(np.uint8)
    size = TYPES[name].block_bytes
    noise.reshape(3, -1, size)[..., -2:] = data.reshape(3, -1, size)[..., -2:]
    decoded = ternary.dequantize(*ternary.unpack(noise, TYPES[name]))
    np.testing.assert_array_equal(decoded, gguf.quants.dequantize(noise, gguf.GGMLQuantizationType[name]))


def test_a_known_ptq1_0_block():
    """Worked by hand: weights 0, 16, 32, 48, 64 are the digits of byte 0, weights 120, 122, 124, 126 those of byte 24."""
    data = np.zeros((1, 28), np.uint8)
    data[0, 26:] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    data[0, 0] = -(-256 * (2 * 81 + 1 * 27 + 0 * 9 + 2 * 3 + 1) // 243)
    data[0, 24] = -(-256 * (1 * 81 + 2 * 27 + 2 * 9 + 0 * 3) // 243)
    want = np.full(128, -0.5)
    want[[0, 16, 32, 48, 64]] = [0.5, 0, -0.5, 0.5, 0]
    want[[120, 122, 124, 126]] = [0, 0.5, 0.5, -0.5]
    np.testing.assert_array_equal(ternary.dequantize(*ternary.unpack(data, ternary.TYPES[143]))[0], want)


def test_unpack_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"^\[gguf\] tensor: expected rows of 28-byte blocks, got uint8 \(3, 29\)"):
        ternary.unpack(np.zeros((3, 29), np.uint8), ternary.TYPES[143])


def add_matrix(writer, target, name, rows, columns, rng, order=lambda rows: rows):
    """A random ternary tensor of a file; its values, and what `q1_models.set_types` needs."""
    data, values = random_matrix(name, rows, columns, rng)
    writer.add_tensor(target, order(data).view(np.int8), raw_dtype=gguf.GGMLQuantizationType.I8)
    return values.astype(np.float32), (columns, NUMBERS[name])


def write(path, name, arch, *, number=None, metadata=None, q1=()):
    """A GGUF of a tiny model with ternary matrices, and the model.

    Args:
        name: Of the type, or a list of types that layers take in turn.
        arch: llama or qwen3.
        number: Another type's number in the header.
        metadata: More of it.
        q1: Tensors that are Q1_0.
    """
    settings = q1_models.config(arch, intermediate_size=512, vocab_size=len(q1_models.TOKENS))
    model = q1_models.make_model(settings)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(64)
    writer.add_context_length(2048)
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(settings["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(q1_models.TOKENS)
    writer.add_token_types([1] * len(q1_models.BYTES) + [3] * len(q1_models.SPECIAL))
    writer.add_token_merges([])
    writer.add_eos_token_id(settings["eos_token_id"])
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)
    rng, patches, weights = np.random.default_rng(7), {}, []
    for i, (path_of, value) in enumerate(q1_models.parameters(model)):
        layer, _, suffix = path_of.rpartition(".")
        target = f"{q1_models.gguf_name(layer)}.{suffix}"
        if value.ndim == 1:
            writer.add_tensor(target, to_numpy(value))
            continue
        heads = {"q_proj": 4, "k_proj": 2}.get(layer.rpartition(".")[2])

        def order(rows, heads=heads):
            return q1_models.interleave(rows, heads) if arch == "llama" and heads else rows

        if target in q1:
            words, scales = one_bit_values(value)
            writer.add_tensor(target, words, raw_dtype=gguf.GGMLQuantizationType.Q1_0)
            weights.append((path_of, mx.array(scales)))
            continue
        kind = name if isinstance(name, str) else name[i % len(name)]
        values, patches[target] = add_matrix(writer, target, kind, *value.shape, rng, order)
        if number is not None:
            patches[target] = value.shape[1], number
        weights.append((path_of, mx.array(values)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_weights(weights, strict=False)
    return q1_models.set_types(path, patches), model


def one_bit_values(value):
    """Q1_0 blocks with scale 0.125 of a matrix, and its values."""
    bits = to_numpy(value) > 0
    blocks = np.packbits(bits.reshape(len(bits), -1, 128), axis=-1, bitorder="little")
    scale = np.broadcast_to(np.frombuffer(np.float16(0.125).tobytes(), np.uint8), (*blocks.shape[:2], 2))
    return np.concatenate([scale, blocks], axis=-1).reshape(len(bits), -1), np.where(bits, 0.125, -0.125).astype(np.float32)


def decoded_weights(model):
    """Every matrix of a model as it computes with it."""
    out = {}
    for path, layer in model.named_modules():
        if isinstance(layer, (mlx.nn.QuantizedLinear, mlx.nn.QuantizedEmbedding)):
            settings = {"group_size": layer.group_size, "bits": layer.bits}
            out[path] = to_numpy(mx.dequantize(layer.weight, layer.scales, layer.biases, **settings))
        elif isinstance(layer, (tqext.nn.TernaryLinear, tqext.nn.TernaryEmbedding)):
            out[path] = reference.ternary_weights(to_numpy(layer.weight), to_numpy(layer.scales))
    return out


def check_same(again, model, group_sizes):
    got = decoded_weights(again)
    want = {name.removesuffix(".weight"): to_numpy(value) for name, value in q1_models.parameters(model) if value.ndim == 2}
    assert got.keys() == want.keys()
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)
    layers = {path: layer for path, layer in again.named_modules() if hasattr(layer, "bits")}
    assert {layer.group_size for layer in layers.values()} == group_sizes
    # What the kernels take is theirs, and takes 2.125 bits a weight.
    ternary = {path: layer for path, layer in layers.items() if layer.group_size == 128}
    assert sorted(tqext.nn.ternary_paths(again)) == sorted(ternary)
    for path, layer in ternary.items():
        assert 8 * (layer.weight.nbytes + layer.scales.nbytes) / got[path].size == 2.125 and "biases" not in layer
    assert_close(q1_models.logits(again), to_numpy(q1_models.logits(model)).astype(np.float64), 1e-5)


@pytest.mark.covering
@pytest.mark.parametrize("arch", ["qwen3", "llama"])
@pytest.mark.parametrize("name", SIZES)
def test_ternary_gguf_gives_the_same_model(name, arch, tmp_path):
    path, model = write(tmp_path / "model.gguf", name, arch)
    again, _ = tqext.load(str(path))
    check_same(again, model, {min(SIZES[name], 128)})


def test_ternary_types_may_be_mixed(tmp_path):
    path, model = write(tmp_path / "model.gguf", ["Q2_0", "PTQ1_0", "TQ2_0"], "qwen3")
    again, _ = tqext.load(str(path))
    check_same(again, model, {64, 128})


def test_ternary_tensors_beside_q1_are_decoded(tmp_path):
    target = "blk.0.ffn_down.weight"
    path, model = write(tmp_path / "model.gguf", "PTQ1_0", "qwen3", q1=(target,))
    again, _ = tqext.load(str(path))
    assert tqext.nn.q1_paths(again) == ["model.layers.0.mlp.down_proj"]
    for name, value in q1_models.parameters(again):
        if value.ndim == 2 and "layers.0.mlp.down_proj" not in name:
            want = dict(q1_models.parameters(model))[name]
            np.testing.assert_array_equal(to_numpy(value), to_numpy(want.astype(value.dtype)), err_msg=name)
    assert_close(q1_models.logits(again), to_numpy(q1_models.logits(model)).astype(np.float64), 1e-5)


def test_ternary_generates_with_a_compressed_cache(tmp_path):
    path, _ = write(tmp_path / "model.gguf", "PTQ1_0", "qwen3")
    model, _ = tqext.load(str(path))
    cache = tqext.make_prompt_cache(model, "tq3")
    logits = model(mx.array([[1, 2, 3]]), cache=cache)
    assert mx.isfinite(logits).all().item() and cache[0].offset == 3


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (36, r"got 36, which was I2_S of Microsoft's bitnet\.cpp; mlx-lm reads the safetensors"),
        (37, r"got 37, which was I8_S of Microsoft's bitnet\.cpp"),
        (38, r"got 38, which was TL1 of Microsoft's bitnet\.cpp"),
        (141, r"that the gguf package knows, got 141"),
    ],
)
def test_types_of_other_programs_are_refused_by_name(number, reason, tmp_path):
    path, _ = write(tmp_path / "model.gguf", "PQ2_0", "qwen3", number=number)
    with pytest.raises(ValueError, match=reason):
        tqext.load(str(path))


@pytest.mark.parametrize(("name", "number"), [("PQ2_0", 143), ("PTQ1_0", 142), ("PTQ1_0", 42)])
def test_another_programs_type_of_the_same_number_does_not_fill_the_file(name, number, tmp_path):
    path, _ = write(tmp_path / "model.gguf", name, "qwen3", number=number)
    with pytest.raises(ValueError, match=r"expected a readable GGUF file, got an error: expected .+ at byte"):
        tqext.load(str(path))


def test_old_and_new_q2_0_are_told_apart_by_their_size(tmp_path):
    for name, block_size in (("Q2_0", 64), ("OLD_Q2_0", 128)):
        path, _ = write(tmp_path / f"{name}.gguf", name, "qwen3")
        tensors, _ = gguf_file.read(path)
        assert {t.tensor_type.block for t in tensors.values() if len(t.shape) == 2} == {block_size}


def test_conversion_to_bfloat16_rounds_scales_only(tmp_path):
    path, model = write(tmp_path / "model.gguf", "PQ2_0", "qwen3")
    loader.convert(path, tmp_path / "model", mx.bfloat16)
    again, _ = tqext.load(str(tmp_path / "model"))
    assert again(mx.array([[1, 2]])).dtype == mx.bfloat16
    want = to_numpy(model.model.layers[0].mlp.up_proj.weight)
    got = decoded_weights(again)["model.layers.0.mlp.up_proj"]
    np.testing.assert_array_equal(np.sign(got), np.sign(want))
    np.testing.assert_allclose(got, want, rtol=2.0**-8)
