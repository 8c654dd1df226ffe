"""GGUF files with Q1_0 tensors: the bytes, the names, the order of rotary rows, the tokenizer, and what is refused."""

import os
import subprocess
import sys

import gguf
import mlx.core as mx
import numpy as np
import pytest

import q1_models
import tqext
from support import assert_close, to_numpy
from tqext import gguf as loader
from tqext import nn, one_bit

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def unhooked(monkeypatch, tmp_path):
    monkeypatch.setenv("TQEXT_CACHE", str(tmp_path / "cache"))
    yield
    one_bit.unhook()


def gguf_name(path):
    if path.startswith("model.layers."):
        _, _, layer, part = path.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}"
    return GGUF_NAMES[path]


def interleave(rows, n_heads):
    """llama.cpp's order: row i and row i + half of a head side by side."""
    out = np.empty_like(rows)
    size = rows.shape[0] // n_heads
    for head in range(n_heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return out


def blocks(words, scales):
    """block_q1_0 by block_q1_0."""
    rows = []
    for row_words, row_scales in zip(words, scales, strict=True):
        row = b""
        for g, scale in enumerate(row_scales):
            row += np.float16(scale).tobytes() + row_words[4 * g : 4 * g + 4].astype("<u4").tobytes()
        rows.append(np.frombuffer(row, np.uint8))
    return np.stack(rows)


def write(path, model, settings, *, metadata=None, rename=None, change=None, plain_type=None):
    """A GGUF of a model with Q1 layers."""
    arch = settings["model_type"]
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_key_length(settings["head_dim"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(settings["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if arch == "qwen3" else "llama-bpe")
    writer.add_token_list(q1_models.TOKENS)
    writer.add_token_types([1] * len(q1_models.BYTES) + [3] * len(q1_models.SPECIAL))
    writer.add_token_merges([])
    writer.add_bos_token_id(settings["bos_token_id"])
    writer.add_eos_token_id(settings["eos_token_id"])
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    values = {name: to_numpy(value) for name, value in q1_models.parameters(model)}
    for name, value in values.items():
        layer, _, suffix = name.rpartition(".")
        if suffix == "scales":
            continue
        target = f"{gguf_name(layer)}.{suffix}"
        target = (rename or {}).get(target, target)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(layer.rpartition(".")[2])

        def order(rows, heads=heads):
            return interleave(rows, settings[heads]) if arch == "llama" and heads else rows

        if f"{layer}.scales" in values:
            data = blocks(order(value), order(values[f"{layer}.scales"]))
            kind = gguf.GGMLQuantizationType.Q1_0
            if change:
                data = change(target, data)
            writer.add_tensor(target, data, raw_dtype=kind)
        elif value.ndim == 2 and plain_type:
            writer.add_tensor(target, gguf.quants.quantize(order(value), plain_type), raw_dtype=plain_type)
        else:
            writer.add_tensor(target, order(value).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dtype():
    """What the loader makes of all that is not 1-bit."""
    return mx.float32 if mx.default_device() == mx.cpu else mx.float16


def make(arch, **changes):
    settings = q1_models.config(arch, **changes)
    model = q1_models.make_model(settings)
    nn.quantize(model)
    for name, value in q1_models.parameters(model):
        if "norm" in name:
            model.load_weights([(name, value.astype(dtype()))], strict=False)
    model.model.embed_tokens.dtype = dtype()
    return model, settings


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_gguf_gives_the_same_model(arch, tied, tmp_path):
    model, settings = make(arch, tie_word_embeddings=tied)
    path = write(tmp_path / "model.gguf", model, settings)
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
    path = write(tmp_path / "model.gguf", model, settings)
    from tqext.models import resolve

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
    path = write(tmp_path / "model.gguf", model, settings, plain_type=kind)
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
        tqext.load(str(write(path, model, settings, metadata=metadata)))
    metadata["qwen3.rope.scaling.original_context_length"] = 512.0
    _, _, config = tqext.load(str(write(path, model, settings, metadata=metadata)), return_config=True)
    want = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert config["rope_scaling"] == want


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
    "unknown name": (
        {"rename": {"blk.0.ffn_up.weight": "blk.0.ffn_up_exps.weight"}},
        r"blk\.0\.ffn_up_exps\.weight: expected",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_gguf_refusals_say_why(case, tmp_path):
    options, message = REFUSED[case]
    model, settings = make("qwen3")
    with pytest.raises(ValueError, match=message):
        tqext.load(str(write(tmp_path / "model.gguf", model, settings, **options)))
    left = list((tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else []
    assert not left  # nothing half converted stays


def test_gguf_of_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "gemma2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 128), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=r"general\.architecture: expected one of \['gemma3', 'llama', 'qwen2', 'qwen3'\], got 'gemma2'"
    ):
        tqext.load(str(tmp_path / "a.gguf"))


def test_gguf_without_q1_tensors_is_refused(tmp_path):
    settings = q1_models.config("qwen3")
    path = write(tmp_path / "plain.gguf", q1_models.make_model(settings), settings)
    with pytest.raises(ValueError, match=r"expected Q1_0 tensors \(type 41\), got none"):
        tqext.load(str(path))


def test_gguf_truncated_or_foreign_files_are_value_errors(tmp_path):
    model, settings = make("qwen3")
    data = write(tmp_path / "model.gguf", model, settings).read_bytes()
    bad = tmp_path / "bad.gguf"
    for content in (data[: len(data) // 2], data[:100], b"", b"not a GGUF file" * 10):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"^\[gguf\] .+expected a readable GGUF file"):
            tqext.load(str(bad))


def test_gguf_with_an_unknown_type_is_a_value_error(tmp_path):
    """Type 143 (PTQ1_0, of 'Bonsai 2') in the header of the first Q1_0 tensor."""
    model, settings = make("qwen3")
    path = write(tmp_path / "model.gguf", model, settings)
    data = bytearray(path.read_bytes())
    at = data.find(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    assert int.from_bytes(data[at : at + 4], "little") == 41
    data[at : at + 4] = (143).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"Bonsai 2"):
        tqext.load(str(path))


def test_unpack_blocks_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"^\[gguf\] tensor: expected rows of 18-byte blocks, got uint8 \(3, 35\)"):
        loader.unpack_blocks(np.zeros((3, 35), np.uint8))


def test_generate_from_a_gguf_file(tmp_path):
    model, settings = make("qwen3", num_hidden_layers=10)
    path = write(tmp_path / "model.gguf", model, settings)
    command = [sys.executable, "-m", "tqext", "generate", "--model", str(path), "--kv", "bonsai", "--max-tokens", "8"]
    done = subprocess.run(
        [*command, "--prompt", "Hello", "--ignore-chat-template"], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 10" in done.stdout
