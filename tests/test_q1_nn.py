"""tqext.nn: 1-bit layers, and the swap of MLX's affine ones."""

import copy
from itertools import pairwise

import mlx.core as mx
import mlx.nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.nn.layers.distributed import shard_linear

import q1_models
import tqext
from support import DTYPES, assert_close, error_line, to_numpy
from tqext import nn

pytestmark = pytest.mark.usefixtures("device")


class Group:
    """A group of a size and rank of our choice; sharding asks for no more."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def linear(rng, rows=48, columns=256, bias=True, dtype=mx.float32):
    layer = mlx.nn.Linear(columns, rows, bias=bias)
    layer.set_dtype(dtype)
    return nn.Q1Linear.from_linear(layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_q1_linear_is_the_dequantised_linear(dtype, bias, rng):
    layer = linear(rng, bias=bias, dtype=DTYPES[dtype])
    x = mx.array(rng.normal(size=(2, 3, 256)).astype(np.float32)).astype(DTYPES[dtype])
    y = layer(x)
    assert y.dtype == x.dtype
    want = to_numpy(x) @ to_numpy(tqext.q1_dequantize(layer.weight, layer.scales)).T
    assert_close(y, want + (to_numpy(layer.bias) if bias else 0), {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.2e-2}[dtype])
    assert not layer.trainable_parameters()


def test_q1_embedding_looks_up_and_projects(rng):
    layer = nn.Q1Embedding.from_embedding(mlx.nn.Embedding(50, 256))
    table = to_numpy(tqext.q1_dequantize(layer.weight, layer.scales))
    ids = mx.array([[3, 49, 0], [7, 7, 1]])
    np.testing.assert_array_equal(to_numpy(layer(ids)), table[to_numpy(ids)])
    x = mx.array(rng.normal(size=(2, 3, 256)).astype(np.float32))
    assert_close(layer.as_linear(x), to_numpy(x) @ table.T, 1e-5)
    half = nn.Q1Embedding(layer.weight, layer.scales)
    assert half(ids).dtype == mx.float16


def logits_on_cpu(model):
    """Of a model with MLX's own 1-bit layers, which MLX does not run on NVIDIA GPUs."""
    with mx.stream(mx.cpu):
        return to_numpy(q1_models.logits(model))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_from_quantized_keeps_the_function_and_drops_the_biases(model_type, tied):
    model = q1_models.make_affine(q1_models.make_model(q1_models.config(model_type, tie_word_embeddings=tied)))
    want, n_parameters, n_layers = logits_on_cpu(model), mlx_lm.utils.get_total_parameters(model), 3 * 7 + 2 - tied
    swap = nn.from_quantized(model)
    assert len(swap.swapped) == n_layers == len(nn.q1_paths(model)) and not swap.kept
    assert not any("biases" in name for name, _ in q1_models.parameters(model))
    assert_close(q1_models.logits(model), want, 1e-4)
    assert mlx_lm.utils.get_total_parameters(model) == n_parameters
    big = [value for name, value in q1_models.parameters(model) if "norm" not in name]
    weights = sum(8 * 4 * value.size for value in big if value.dtype == mx.uint32)
    assert sum(8 * value.nbytes for value in big) / weights == 1.125


def test_from_quantized_refuses_biases_that_are_not_half_the_scale():
    model = q1_models.make_affine(q1_models.make_model(q1_models.config()))
    layer = model.model.layers[1].mlp.down_proj
    layer.biases = mx.where(mx.arange(layer.biases.shape[1]) == 1, layer.biases * 1.01, layer.biases)
    want = logits_on_cpu(model)
    with pytest.raises(ValueError, match=r"^\[from_quantized\] model\.layers\.1\.mlp\.down_proj\.biases: .+ 256 of 768"):
        nn.from_quantized(model)
    assert not nn.q1_paths(model)  # nothing half done
    swap = nn.from_quantized(model, strict=False)
    assert list(swap.kept) == ["model.layers.1.mlp.down_proj"] and "1 left as they were" in str(swap)
    assert_close(logits_on_cpu(model), want, 1e-4)


@pytest.mark.parametrize("spoil", [np.nan, np.inf, 1e30])
def test_from_quantized_refuses_scales_that_float16_cannot_hold(spoil):
    model = q1_models.make_affine(q1_models.make_model(q1_models.config()))
    layer = model.model.layers[0].self_attn.q_proj
    layer.scales = layer.scales.at[0, 0].add(spoil)
    layer.biases = -layer.scales / 2
    with pytest.raises(ValueError, match=r"q_proj\.(scales|biases): expected"):
        nn.from_quantized(model)


def test_from_quantized_leaves_other_layers():
    model = q1_models.make_model(q1_models.config())
    mlx.nn.quantize(model, group_size=64, bits=4)
    assert str(nn.from_quantized(model)) == "0 layers with 1-bit weights"
    # Two bits that are not ternary: biases that are not -scales.
    model = q1_models.make_model(q1_models.config())
    mlx.nn.quantize(model, group_size=128, bits=2)
    assert str(nn.from_quantized(model)) == "0 layers with 1-bit weights"
    layer = model.model.layers[0].mlp.up_proj
    layer.scales = mx.abs(layer.scales).astype(mx.float16).astype(mx.float32)
    layer.biases = -layer.scales
    x = mx.random.normal((3, 256))
    want = to_numpy(layer(x)).astype(np.float64)
    assert str(swap := nn.from_quantized(model)) == "0 layers with 1-bit weights, 1 with ternary ones"
    assert swap.ternary == nn.ternary_paths(model) == ["model.layers.0.mlp.up_proj"]
    assert_close(model.model.layers[0].mlp.up_proj(x), want, 1e-5)
    model = q1_models.make_affine(q1_models.make_model(q1_models.config()), group_size=64)
    with pytest.raises(ValueError, match=r"group_size: expected 128, got 64"):
        nn.from_quantized(model)


def test_mlx_quantize_and_dequantize_pass_by():
    model = q1_models.make_model(q1_models.config())
    nn.quantize(model)
    before = nn.q1_paths(model)
    mlx.nn.quantize(model, group_size=64, bits=4)
    assert nn.q1_paths(model) == before


def test_quantize_keeps_odd_widths():
    model = q1_models.make_model(q1_models.config(intermediate_size=320))
    swap = nn.quantize(model)
    assert sorted(swap.kept) == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert "expected a multiple of 128 columns, got 320" in str(swap)
    assert np.isfinite(to_numpy(q1_models.logits(model))).all()


@pytest.mark.parametrize("segments", [1, 2, [0.5, 0.75]])
@pytest.mark.parametrize("size", [1, 2])
def test_shard_linear_splits_rows(size, segments, rng):
    layer = linear(rng, rows=48)
    x = mx.array(rng.normal(size=(3, 256)).astype(np.float32))
    parts = [shard_linear(layer, "all-to-sharded", segments=segments, group=Group(r, size)) for r in range(size)]
    assert all(type(part) is nn.Q1AllToShardedLinear for part in parts)
    bounds = {1: [0, 48], 2: [0, 24, 48]}.get(segments if isinstance(segments, int) else None, [0, 24, 36, 48])
    whole = to_numpy(layer(x))
    for r, part in enumerate(parts):
        pieces = [(a + (b - a) // size * r, (b - a) // size) for a, b in pairwise(bounds)]
        rows = [a + i for a, n in pieces for i in range(n)]
        assert_close(part(x), whole[:, rows], 1e-5)


def test_shard_linear_splits_columns(rng):
    layer = linear(rng, bias=False)
    x = mx.array(rng.normal(size=(3, 256)).astype(np.float32))
    total = 0
    for r in range(2):
        part = shard_linear(layer, "sharded-to-all", group=Group(r, 2))
        assert type(part) is nn.Q1ShardedToAllLinear and part.weight.shape == (48, 4)
        total = total + tqext.q1_matmul(x[:, 128 * r : 128 * r + 128], part.weight, part.scales)
    assert_close(total, to_numpy(layer(x)), 1e-5)
    with pytest.raises(ValueError, match=error_line("shard_linear", "group")):
        shard_linear(layer, "sharded-to-all", group=Group(0, 4))


def test_shard_linear_splits_ternary_layers(rng):
    words = mx.array(rng.integers(0, 2**32, (48, 16), dtype=np.uint32))
    layer = nn.TernaryLinear(words, mx.array(rng.normal(size=(48, 2)).astype(np.float16)), mx.array(rng.normal(size=48)))
    x = mx.array(rng.normal(size=(3, 256)).astype(np.float32))
    whole, total = to_numpy(layer(x)), 0
    for r in range(2):
        rows = shard_linear(layer, "all-to-sharded", group=Group(r, 2))
        assert type(rows) is nn.TernaryAllToShardedLinear
        assert_close(rows(x), whole[:, 24 * r : 24 * r + 24].astype(np.float64), 1e-5)
        columns = shard_linear(layer, "sharded-to-all", group=Group(r, 2))
        assert type(columns) is nn.TernaryShardedToAllLinear and columns.weight.shape == (48, 8)
        total = total + tqext.ternary_matmul(x[:, 128 * r : 128 * r + 128], columns.weight, columns.scales)
    assert_close(total + layer.bias, whole.astype(np.float64), 1e-5)
    alone = shard_linear(layer, "sharded-to-all", group=mx.distributed.init())
    assert_close(alone(x), whole.astype(np.float64), 1e-5)


@pytest.mark.parametrize("segments", [2, [0.3]])
def test_shard_linear_cuts_columns_at_groups(segments, rng):
    layer = linear(rng, bias=False, columns=8 * 128)
    x = mx.array(rng.normal(size=(3, 8 * 128)).astype(np.float32))
    bounds = [0, 4, 8] if segments == 2 else [0, 2, 8]
    total = 0
    for r in range(2):
        part = shard_linear(layer, "sharded-to-all", segments=segments, group=Group(r, 2))
        groups = [a + (b - a) // 2 * r + i for a, b in pairwise(bounds) for i in range((b - a) // 2)]
        mine = mx.concatenate([x[:, 128 * g : 128 * g + 128] for g in groups], axis=1)
        total = total + tqext.q1_matmul(mine, part.weight, part.scales)
    assert_close(total, to_numpy(layer(x)), 1e-5)
    with pytest.raises(ValueError, match=error_line("shard_linear", "segments")):
        shard_linear(layer, "sharded-to-all", segments=8, group=Group(0, 2))


def test_model_shard_before_and_after_the_swap():
    """A group of one: every layer changes its class, the function stays."""
    group = mx.distributed.init()
    settings = q1_models.config()
    affine = q1_models.make_affine(q1_models.make_model(settings))
    want = logits_on_cpu(affine)
    first, second = copy.deepcopy(affine), affine
    nn.from_quantized(first)
    first.shard(group)
    second.shard(group)
    nn.from_quantized(second)
    for model in (first, second):
        kinds = {type(layer) for layer in model.modules()}
        assert {nn.Q1AllToShardedLinear, nn.Q1ShardedToAllLinear, nn.Q1Embedding} <= kinds
        assert not kinds & {mlx.nn.QuantizedLinear, mlx.nn.QuantizedEmbedding}
        assert_close(q1_models.logits(model), want, 1e-4)


def test_shard_linear_still_splits_affine_layers(rng):
    layer = mlx.nn.QuantizedLinear(256, 48, bits=4, group_size=64)
    part = shard_linear(layer, "all-to-sharded", group=mx.distributed.init())
    x = mx.array(rng.normal(size=(3, 256)).astype(np.float32))
    assert_close(part(x), to_numpy(layer(x)), 1e-6)


@pytest.mark.parametrize("sharding", ["all-to-sharded", "sharded-to-all"])
def test_shard_linear_refuses_layers_that_rotate_their_inputs(sharding):
    """MLX would take the weights and forget the rotation."""
    folded = pytest.importorskip("mlx_lm.models.prism_hadamard_qwen35")
    group, width = mx.distributed.init(), 1024
    rotated, plain = (folded.HadamardQuantizedLinear(width, 48, block) for block in (width, 0))
    with pytest.raises(ValueError, match=r"\[shard_linear\] module: expected .+, got a HadamardQuantizedLinear with signs"):
        shard_linear(rotated, sharding, group=group)
    assert shard_linear(plain, sharding, group=group)(mx.ones((1, width))).shape == (1, 48)
