"""GGUF files of Qwen 3.5 with ternary weights, plain and Hadamard-folded ('Bonsai 2'), compared with a dense model."""

import importlib.util
import json

import gguf
import mlx.core as mx
import mlx.nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten

import q1_models
import tqext
from support import assert_close, to_numpy
from tqext import gguf as loader
from tqext import one_bit
from tqext.one_bit import gguf_file

HIDDEN, INNER, BLOCK, VOCABULARY = 512, 1024, 512, len(q1_models.TOKENS)
N_KEYS, N_VALUES, KEY_DIM, VALUE_DIM = 2, 6, 64, 256  # value heads share key heads by threes: a wrong order shows
KEYS, VALUES = N_KEYS * KEY_DIM, N_VALUES * VALUE_DIM
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
needs_folded_model = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm.models.prism_hadamard_qwen35") is None, reason="mlx-lm without the folded model"
)


@pytest.fixture(autouse=True)
def unhooked(monkeypatch, tmp_path):
    monkeypatch.setenv("TQEXT_CACHE", str(tmp_path / "cache"))
    yield
    one_bit.unhook()


def dense_model(tied):
    """mlx-lm's plain model with random weights, in fp32."""
    text = {
        "model_type": "qwen3_5",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": VOCABULARY,
        "linear_num_value_heads": N_VALUES,
        "linear_num_key_heads": N_KEYS,
        "linear_key_head_dim": KEY_DIM,
        "linear_value_head_dim": VALUE_DIM,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 2,
        "rope_parameters": {"type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": tied,
    }
    model = q1_models.make_model({"model_type": "qwen3_5", "text_config": text})
    return model


def tiled(x, unit, axis=0, begin=0):
    """llama.cpp's order of heads of `unit` along an axis, from `begin` on."""
    x = np.moveaxis(np.array(x), axis, 0)
    out = x.copy()
    for key in range(N_KEYS):
        for value in range(N_VALUES // N_KEYS):
            source = begin + (key * (N_VALUES // N_KEYS) + value) * unit
            target = begin + (value * N_KEYS + key) * unit
            out[target : target + unit] = x[source : source + unit]
    return np.moveaxis(out, 0, axis)


def as_in_the_file(name, x, folded):
    """A tensor in llama.cpp's order."""
    part = name.split(".", 2)[-1]
    if part in ("attn_qkv.weight", "ssm_conv1d.weight"):
        return tiled(x, VALUE_DIM, begin=2 * KEYS)
    if part == "attn_gate.weight":
        return tiled(x, VALUE_DIM)
    if part in ("ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias"):
        return tiled(x, 1)
    if part == "ssm_out.weight" and not folded:
        return tiled(x, VALUE_DIM, axis=1)
    return x


def gguf_name(path):
    if path.endswith("linear_attn.A_log"):
        return f"blk.{path.split('.')[2]}.ssm_a"
    if path.endswith("linear_attn.dt_bias"):
        return f"blk.{path.split('.')[2]}.ssm_dt.bias"
    layer, _, suffix = path.rpartition(".")
    if layer in OUTER:
        return f"{OUTER[layer]}.{suffix}"
    _, _, number, part = layer.split(".", 3)
    return f"blk.{number}.{NAMES[part]}.{suffix}"


def pq2_0(codes, scales):
    quads = codes.reshape(len(codes), -1, 32, 4)
    data = sum(quads[..., i] << 2 * i for i in range(4)).astype(np.uint8)
    d = scales[..., None].astype("<f2").view(np.uint8)
    return np.concatenate([d, data], axis=-1).reshape(len(codes), -1)


def hadamard(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def unfold(weights, signs):
    """W of the W S H that is stored: rows times H, then times S."""
    rotated = weights.reshape(len(weights), -1, BLOCK) @ hadamard(BLOCK)
    return rotated.reshape(weights.shape) * signs


def write(path, *, folded, tied=False):
    """A GGUF, and the dense model of its weights."""
    model, rng = dense_model(tied), np.random.default_rng(3)
    writer = gguf.GGUFWriter(str(path), "qwen35")
    for key, value in {
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "context_length": 2048,
        "rope.dimension_count": 32,
        "full_attention_interval": 2,
        "ssm.conv_kernel": 4,
        "ssm.group_count": N_KEYS,
        "ssm.time_step_rank": N_VALUES,
        "ssm.state_size": KEY_DIM,
        "ssm.inner_size": VALUES,
    }.items():
        writer.add_uint32(f"qwen35.{key}", value)
    writer.add_array("qwen35.rope.dimension_sections", [6, 6, 4, 0])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(q1_models.TOKENS)
    writer.add_token_types([1] * len(q1_models.BYTES) + [3] * len(q1_models.SPECIAL))
    writer.add_token_merges([])
    writer.add_eos_token_id(len(q1_models.BYTES) + 1)
    signs = {width: rng.choice([-1, 1], width) for width in (HIDDEN, VALUES, INNER)}
    weights, patches = [], {}
    for full, value in tree_flatten(model.parameters()):
        name = full.removeprefix("language_model.")
        target, value = gguf_name(name), to_numpy(value).astype(np.float64)
        if name.endswith("A_log"):
            value = np.linspace(0.1, 2, N_VALUES)
            writer.add_tensor(target, as_in_the_file(target, -np.exp(value), folded).astype(np.float32))
        elif name.endswith(("dt_bias", "in_proj_a.weight", "in_proj_b.weight")):
            value = rng.normal(0, 0.05, value.shape).astype(np.float16)
            writer.add_tensor(target, as_in_the_file(target, value, folded).astype(np.float32))
        elif value.ndim == 3:
            value = rng.normal(0, 0.3, value.shape).astype(np.float16)
            writer.add_tensor(target, as_in_the_file(target, value[..., 0], folded).astype(np.float32))
        elif value.ndim == 1:
            value = value.astype(np.float16)
            writer.add_tensor(target, value.astype(np.float32))
        else:
            codes = rng.integers(0, 3, value.shape)
            scales = rng.uniform(0.02, 0.06, (len(codes), value.shape[1] // 128)).astype(np.float16)
            value = (codes - 1) * np.repeat(scales, 128, axis=1).astype(np.float64)
            stored = as_in_the_file(target, codes, folded)
            # A head is whole groups, so that the scales have an order too.
            stored_scales = as_in_the_file(target, np.repeat(scales, 128, axis=1), folded)[:, ::128]
            data = pq2_0(stored, np.ascontiguousarray(stored_scales))
            writer.add_tensor(target, data.view(np.int8), raw_dtype=gguf.GGMLQuantizationType.I8)
            patches[target] = value.shape[1], 142
            if folded:
                value = unfold(value, signs[value.shape[1]])
        weights.append((full, mx.array(value.astype(np.float32))))
    if folded:
        fold = {
            "version": 2 if tied else 1,
            "block_size": BLOCK,
            "transform": "normalized-sylvester-walsh-hadamard",
            "axis": "input-last-dimension",
            "sign_mode": "explicit",
            "sign_widths": [int(width) for width in signs],
            "sign_values": [int(sign) for values in signs.values() for sign in values],
            "weight_names": [name for name in patches if name != "token_embd.weight"],
            "inverse_weight_names": ["token_embd.weight"],
            "gdn_v_grouped": True,
            **({"tied_output": True} if tied else {}),
        }
        kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        for key, value in fold.items():
            kinds[type(value)](f"prism.hadamard.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_weights(weights)
    return q1_models.set_types(path, patches), model


def logits(model):
    return to_numpy(model(mx.array([[1, 5, 9, 200, 3, 3, 7, 80, 41]])).astype(mx.float32)).astype(np.float64)


def test_qwen35_gguf_gives_the_same_model(tmp_path):
    path, model = write(tmp_path / "model.gguf", folded=False)
    loader.convert(path, tmp_path / "made", mx.float32)
    again, tokenizer = tqext.load(str(tmp_path / "made"))
    assert again.language_model.model.layers[0].linear_attn.out_proj.bits == 2
    assert_close(logits(again), logits(model), 1e-4)
    assert tokenizer.decode(tokenizer.encode("Hello, wörld 123", add_special_tokens=False)) == "Hello, wörld 123"


@needs_folded_model
@pytest.mark.parametrize("tied", [False, True])
def test_folded_qwen35_gguf_computes_what_the_unfolded_weights_do(tied, tmp_path):
    path, model = write(tmp_path / "model.gguf", folded=True, tied=tied)
    again, _ = tqext.load(str(path))
    layer = again.language_model.model.layers[0].mlp.down_proj
    assert isinstance(layer, tqext.nn.TernaryLinear) and layer.block == BLOCK and layer.scales.dtype == mx.float16
    assert len(tqext.nn.ternary_paths(again)) == 2 * 3 + 4 + 3 + (1 if tied else 2)
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.float16
    assert again(mx.array([[1, 2]])).dtype == dtype
    # Scales that are float16 in the file are so whatever becomes of the model's other weights.
    again.set_dtype(mx.float32)
    assert_close(logits(again), logits(model), 1e-4 if dtype == mx.float32 else 4e-3)


@needs_folded_model
def test_folded_layers_compute_what_mlx_lms_own_do(folded_file, tmp_path):
    loader.convert(folded_file[0], tmp_path / "made", mx.float32)
    theirs, _ = mlx_lm.utils.load_model(tmp_path / "made")
    ours, _ = tqext.load(str(tmp_path / "made"))
    tokens = mx.array([[3, 7, 11]])
    # Their embedding rounds to fp16.
    embedding = theirs.language_model.model.embed_tokens, ours.language_model.model.embed_tokens
    assert_close(embedding[1](tokens), to_numpy(embedding[0](tokens)).astype(np.float64), 1e-3)
    x = mx.random.normal((3, INNER))
    down = [model.language_model.model.layers[0].mlp.down_proj for model in (theirs, ours)]
    assert_close(down[1](x), to_numpy(down[0](x)).astype(np.float64), 1e-5)
    with pytest.raises(ValueError, match=r"\[shard_linear\] layer: expected weights without a rotation"):
        mlx.nn.layers.distributed.shard_linear(down[1], "all-to-sharded")


@needs_folded_model
def test_folded_qwen35_generates_with_a_compressed_cache(folded_file):
    model, _ = tqext.load(str(folded_file[0]))
    cache = tqext.make_prompt_cache(model, "tq3")
    tokens = mx.array([[1, 5, 9, 200, 3, 3, 7, 80, 41]])
    assert mx.isfinite(model(tokens, cache=cache)).all().item()


FOLDS = {
    "version": ({"version": 3}, r"prism\.hadamard\.version: expected 1 or 2, got 3"),
    "transform": ({"transform": "dct"}, r"prism\.hadamard\.transform: expected 'normalized-.+', got 'dct'"),
    "axis": ({"axis": "output"}, r"prism\.hadamard\.axis: expected 'input-last-dimension', got 'output'"),
    "block size": ({"block_size": 48}, r"prism\.hadamard\.block_size: expected a power of two, got 48"),
    "large blocks": ({"block_size": 2048}, r"expected whole blocks of 2048 inputs, got "),
    "other modes": ({"sign_mode": "hashed"}, r"sign_mode: expected 'identity' or 'explicit', got 'hashed'"),
    "sign widths": ({"sign_widths": [512]}, r"sign_widths: expected different widths of 3072 signs, got \[512\]"),
    "missing width": ({"sign_widths": [3072]}, r"sign_widths: expected the \d+ inputs of .+, got \[3072\]"),
    "signs": ({"sign_values": [2] * 3072}, r"sign_values: expected -1 and 1 only, got other numbers"),
    "tied": ({"tied_output": True}, r"tied_output: expected true in version 2 without output\.weight, else false, got True"),
    "tiled": ({"gdn_v_grouped": False}, r"gdn_v_grouped: expected True, got False"),
    "no name": ({"weight_names": ["blk.9.ffn_up.weight"]}, r"weight_names: expected names of tensors, got blk\.9\.ffn_up"),
    "norm": ({"weight_names": ["output_norm.weight"]}, r"output_norm\.weight: expected a ternary type .+ when folded, got F32"),
    "inverse": ({"inverse_weight_names": ["output.weight"]}, r"no other than token_embd\.weight in inverse_weight_names"),
    "no version": ({"version": None}, r"prism\.hadamard\.version: expected 1 or 2, got None"),
}


@pytest.fixture(scope="module")
def folded_file(tmp_path_factory):
    path, _ = write(tmp_path_factory.mktemp("folded") / "model.gguf", folded=True)
    return path, *loader.read(path)


@needs_folded_model
@pytest.mark.parametrize("case", FOLDS)
def test_folds_that_are_not_undone_are_refused(case, folded_file, tmp_path, monkeypatch):
    changes, reason = FOLDS[case]
    path, tensors, metadata = folded_file
    changed = {**metadata, **{f"prism.hadamard.{key}": value for key, value in changes.items()}}
    monkeypatch.setattr(gguf_file, "read", lambda _: (tensors, {k: v for k, v in changed.items() if v is not None}))
    with pytest.raises(ValueError, match=reason):
        loader.convert(path, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_folded_file_needs_an_mlx_lm_that_knows_it(folded_file, monkeypatch):
    path = folded_file[0]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "prism_hadamard" in name else find(name))
    with pytest.raises(ValueError, match=r"expected an mlx-lm with the model prism_hadamard_qwen35 .+, got mlx-lm \d"):
        tqext.load(str(path))


@needs_folded_model
def test_folded_config_is_mlx_lms_pack(folded_file, tmp_path):
    path = folded_file[0]
    loader.convert(path, tmp_path / "made", mx.float32)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 128, "bits": 2, "mode": "affine"}
    assert {module["block"] for module in config["modules"]} == {BLOCK}
    assert [module["path"] for module in config["modules"] if module["embedding"]] == ["model.embed_tokens"]
    model, _ = mlx_lm.utils.load_model(tmp_path / "made")
    assert model.model_type == "prism_hadamard_qwen35"
