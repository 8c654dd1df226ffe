"""The balance of each layer, the errors that the guard goes by, and how both are kept."""

import re
import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models import cache as stock
from mlx_lm.models import llama, qwen2, rope_utils

import tqext
import tqext.mlx_lm
import zoo
from q1_models import make_one_bit
from support import to_numpy
from tiny import CONFIG, logits_after, make_biased_qwen2, make_llama, make_qwen2, prompt, sharpen
from tqext import Recipe, TurboQuantKVCache, blas, calibration, get_policy
from tqext.calibration import N_LEFT_OUT, N_TOKENS, balance_of
from tqext.mlx_lm import PathError, stock_cache
from tqext.mlx_lm.caches import members
from tqext.mlx_lm.guard import judged

pytestmark = pytest.mark.usefixtures("uninstalled", "no_kept_calibration")
OFF = dict(means=False, balance=False)


@pytest.fixture
def runs(monkeypatch):
    """The positions at which the prompt was run."""
    shifts, last = [], []
    new = calibration.ObservingCache.__init__

    def count(self, shift, turns):
        if last != [turns, shift]:
            last[:] = [turns, shift]
            shifts.append(shift)
        new(self, shift, turns)

    monkeypatch.setattr(calibration.ObservingCache, "__init__", count)
    return shifts


def balances(model, preset="tq3", **overrides):
    found = tqext.calibrate(model, preset, **overrides)
    return {path: np.array(c.balance) for (path, recipe), c in found.layers.items() if recipe.key_bits == 3}


def with_key_bias(pairs, norm=300.0, **changes):
    """A model whose first layer's keys are one large vector, in these rotary pairs, and little else."""
    mx.random.seed(5)
    args = qwen2.ModelArgs.from_dict(CONFIG | {"model_type": "qwen2", "rope_theta": 1e6, "hidden_size": 256} | changes)
    model = sharpen(qwen2.Model(args), 5, 1.6)
    bias = mx.random.normal((2, 64)) * mx.array([float(i % 32 in pairs) for i in range(64)])
    bias = bias * (norm / mx.linalg.norm(bias, axis=1, keepdims=True))
    model.layers[0].self_attn.k_proj.bias = bias.flatten()
    mx.eval(model.parameters())
    return model


# The prompt and its places


def test_prompt_is_the_same_everywhere_and_within_the_vocabulary():
    for n in (60, 300, 151936):
        model = nn.Module()
        model.args = {"vocab_size": n}
        tokens = np.array(calibration.prompt(model))
        assert tokens.shape == (1, N_TOKENS)
        assert tokens.min() >= 0 and tokens.max() < n
        assert np.median(tokens) < n / 4, "common tokens have small numbers"
        assert len(np.unique(tokens)) > min(n, N_TOKENS) / 2
    x = 1
    for token in tokens[0]:
        x = (1103515245 * x + 12345) % 2**31
        assert token == int((x / 2**31) ** 3 * 151936)


@pytest.mark.parametrize(
    ("args", "context"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"text_config": {"n_positions": 1024}}, 1024),
        (
            {"max_position_embeddings": 32768, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
        (
            {"max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192}},
            131072,
        ),
        ({"max_position_embeddings": 100}, 100),
        ({}, 32768),
    ],
)
def test_positions_reach_from_the_start_to_the_end_of_the_trained_context(args, context):
    model = nn.Module()
    model.args = args
    assert calibration.trained_context(model) == context
    at = calibration.offsets(model)
    assert at[0] == 0 and at[-1] == max(0, context - N_TOKENS)
    assert at == sorted(set(at)) and len(at) == (1 if context <= N_TOKENS else calibration.N_OFFSETS)


# Turning


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [64, 32])
@pytest.mark.parametrize("how", ["base", "scale", "llama3", "longrope"])
def test_turn_is_what_rope_gives_at_another_position(traditional, dims, how):
    """For all layouts of the pairs, partial rotation and scaled frequencies."""
    at = [0, 1, 100, 5000]
    if how == "llama3":
        scaling = {"rope_type": how, "factor": 8.0, "original_max_position_embeddings": 1024}
        rope = rope_utils.initialize_rope(dims, 1e4, traditional, scaling, 8192)
    elif how == "longrope":
        factors = [1.0 + i / 8 for i in range(dims // 2)]
        scaling = {"rope_type": how, "short_factor": factors, "long_factor": factors, "original_max_position_embeddings": 1024}
        rope = rope_utils.initialize_rope(dims, 1e4, traditional, scaling, 8192)
    else:
        rope = nn.RoPE(dims, traditional=traditional, base=1e4, scale=0.5 if how == "scale" else 1.0)
    x = mx.random.normal((1, 3, 40, 64))
    turns = calibration._Turns(at)
    with calibration._noted_rope_calls():
        first = rope(x, offset=7)
        turn = calibration._turn_of(first, turns)
        assert calibration._turn_of(first + 0, turns) is None
    squares = []
    for i, shift in enumerate(at):
        expected = rope(x, offset=7 + shift)
        assert mx.allclose(turn(first, i), expected, atol=2e-3), shift
        squares.append((expected[0] ** 2).mean(axis=1))
    assert mx.allclose(turn.mean_square(first[0]), mx.stack(squares).mean(axis=0), rtol=5e-3)


def test_rope_is_given_back():
    before = mx.fast.rope
    with pytest.raises(KeyError), calibration._noted_rope_calls():
        assert mx.fast.rope is not before
        raise KeyError
    assert mx.fast.rope is before


@pytest.mark.parametrize("make", [make_llama, make_qwen2])
def test_one_run_is_worth_a_run_at_every_position(make, runs, monkeypatch):
    """RoPE attention depends on distances alone: what is turned is what a shifted run would have shown."""
    model = make(max_position_embeddings=4096)
    at = calibration.offsets(model, 6)
    monkeypatch.setattr(calibration, "offsets", lambda model, n=None: at)
    turned = tqext.calibrate(model, "tq3")
    assert runs == [0]
    runs.clear()
    calibration._kept.clear()
    monkeypatch.setattr(calibration, "_turn_of", lambda x, turns: None)
    monkeypatch.setattr(calibration, "_read", lambda *args: None)
    shifted = tqext.calibrate(model, "tq3")
    assert runs == at
    for key, a in turned.layers.items():
        b = shifted.layers[key]
        assert mx.allclose(a.balance, b.balance, rtol=2e-3), key
        # The same places are looked at, and a code or two may differ.
        assert np.allclose([a.output_error, a.score_error], [b.output_error, b.score_error], rtol=0.1)


@pytest.mark.parametrize(
    ("kind", "n_runs"),
    [
        ("jamba", 2),  # no positions: once more to see that they make no difference
        ("gpt2", 5),  # positions in the embedding
        ("phi", 5),  # queries of another type than ``mx.fast.rope`` gave
        ("deepseek_v2", 5),  # queries and keys with a part that does not turn
    ],
)
def test_a_model_that_cannot_be_turned_is_run_again(kind, n_runs, runs):
    n_compressed, changes = {**zoo.PLAIN, **zoo.SPECIAL}[kind]
    assert len(balances(zoo.make(kind, changes))) == n_compressed
    assert len(runs) == n_runs


# Balance and errors


def test_balance_is_the_formula():
    rng = np.random.default_rng(0)
    q, x = rng.uniform(1e-3, 10, (2, 3, 64))
    expected = (q / x) ** 0.25
    expected /= np.median(expected, axis=1, keepdims=True)
    assert np.allclose(np.array(balance_of(mx.array(q), mx.array(x))), expected, rtol=1e-5)


def test_balance_stays_within_bounds():
    q, x = np.ones((2, 1, 8), np.float32)
    q[0, :4], x[0, :4] = (0, 0, 1, 1e30), (0, 1, 0, 1)
    got = np.array(balance_of(mx.array(q), mx.array(x)))[0]
    assert got.tolist() == [1, 1 / 64, 64, 64, 1, 1, 1, 1]
    dead = mx.zeros((1, 8))
    assert np.array(balance_of(dead, dead)).tolist() == [[1.0] * 8]
    assert np.isfinite(np.array(balance_of(mx.full((1, 8), mx.nan), dead + 1))).all()


def layers_of(model, preset="tq3", **overrides):
    recipe = get_policy(preset, **overrides).recipe
    found = tqext.calibrate(model, preset, **overrides).layers
    return [found[str(i), recipe] for i in range(3)]


def exact_steps(model, shift):
    """Queries and keys of every layer at one offset, taken from the model's own modules."""
    tokens = calibration.prompt(model)
    x = model.model.embed_tokens(tokens)
    steps = []
    for layer in model.model.layers:
        a, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            p(h).reshape(1, h.shape[1], n, -1).transpose(0, 2, 1, 3)
            for p, n in ((a.q_proj, a.n_heads), (a.k_proj, a.n_kv_heads), (a.v_proj, a.n_kv_heads))
        )
        q, k = a.rope(q, offset=shift), a.rope(k, offset=shift)
        steps.append((to_numpy(q).astype(np.float64), to_numpy(k).astype(np.float64)))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=a.scale, mask="causal")
        x = x + a.o_proj(out.transpose(0, 2, 1, 3).reshape(1, h.shape[1], -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return steps


def test_calibration_balance_is_that_of_another_forward_pass():
    """From queries and keys that another forward pass yields, in float64."""
    model = make_qwen2(max_position_embeddings=4096)
    at = calibration.offsets(model)
    assert at[0] == 0 and at[-1] == 4096 - 512 and len(at) == calibration.N_OFFSETS
    steps = [exact_steps(model, shift) for shift in at]
    for i, layer in enumerate(layers_of(model)):
        q2, x2 = [], []
        for step in steps:
            q, k = (y[0, :, 64:] for y in step[i])
            blocks = k.reshape(k.shape[0], -1, 64, k.shape[-1])
            x = blocks - blocks.mean(2, keepdims=True)
            x2.append((x**2).mean((1, 2)))
            q2.append((q**2).reshape(k.shape[0], -1, q.shape[1], q.shape[2]).mean((1, 2)))
        want = (np.mean(q2, 0) / np.mean(x2, 0)) ** 0.25
        want = np.clip(want / np.median(want, -1, keepdims=True), 1 / 64, 64)
        got = to_numpy(layer.balance)
        assert got.dtype == np.float32 and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=5e-3)  # means are rounded to fp16, sums taken in fp32


def test_calibration_errors_fall_with_the_bits():
    model = make_llama()
    by_bits = [[layer.score_error for layer in layers_of(model, preset)] for preset in ("tq2", "tq33", "tq4")]
    for two, three, four in zip(*by_bits, strict=True):
        # The codebooks' distortions: 0.116, 0.034, 0.0093.
        assert two / three == pytest.approx((0.131 / 0.0352) ** 0.5, rel=0.15)
        assert three / four == pytest.approx((0.0352 / 0.0094) ** 0.5, rel=0.15)


def reference_errors(k, v, q, scale, recipe, balance):
    """In float64, from what the packed bytes stand for."""
    means = tqext.block_means(k) if recipe.means else None
    coded_k = tqext.dequantize(tqext.quantize_keys(k, bits=recipe.key_bits, means=means, balance=balance))
    coded_v = tqext.dequantize(tqext.quantize_values(v, bits=recipe.value_bits, coding=recipe.value_coding))
    k, v, coded_k, coded_v, q = (np.array(a, np.float64)[0] for a in (k, v, coded_k, coded_v, q))
    group = len(q) // len(k)
    k, v, coded_k, coded_v = (np.repeat(a, group, axis=0) for a in (k, v, coded_k, coded_v))

    def softmax(s):
        e = np.exp(s - s.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    exact, coded = (q @ a.swapaxes(1, 2) * scale for a in (k, coded_k))
    output = softmax(exact) @ v
    change = coded - exact
    change -= change.mean(-1, keepdims=True)
    attended = softmax(exact) @ (v**2).sum(-1, keepdims=True)
    return [np.sqrt(((softmax(coded) @ coded_v - output) ** 2).sum() / attended.sum()), np.sqrt((change**2).mean())]


@pytest.mark.parametrize("preset", ["tq3", "tq33", "tq4", "tq3-plain"])
def test_errors_are_those_of_the_operators(preset):
    """At one position, by an independent computation over the model's own queries, keys and values."""
    model = make_llama(max_position_embeddings=N_TOKENS)
    recipe = get_policy(preset).recipe
    seen = []
    previous = mx.fast.scaled_dot_product_attention
    mx.fast.scaled_dot_product_attention = lambda q, k, v, **kw: seen.append((q, k, v, kw["scale"])) or previous(q, k, v, **kw)
    logits_after(model, stock_cache(model), calibration.prompt(model).tolist()[0])
    mx.fast.scaled_dot_product_attention = previous
    found = tqext.calibrate(model, preset, guard=True).layers
    for path, (q, k, v, scale) in enumerate(seen):
        got = found[str(path), recipe]
        k, v = k[:, :, N_LEFT_OUT:N_TOKENS], v[:, :, N_LEFT_OUT:N_TOKENS]
        rows = q[0, :, N_LEFT_OUT:].reshape(2, -1, 64)
        x = k
        if recipe.means:
            x = k - mx.repeat(tqext.block_means(k).astype(mx.float32), 64, axis=2)
        balance = None
        if recipe.balance:
            balance = balance_of((rows**2).mean(axis=1), (x[0] ** 2).mean(axis=1))
            assert mx.allclose(got.balance, balance, rtol=1e-3)
        expected = reference_errors(k, v, q[:, :, -32:], scale, recipe, balance)
        assert np.allclose([got.output_error, got.score_error], expected, rtol=0.02), path


def test_balance_lowers_the_error_of_the_scores():
    """Keys with a few large channels that queries hardly use."""
    model = make_llama()
    for layer in model.layers:
        gains = mx.where(mx.arange(64) % 16 == 3, 12.0, 1.0)
        layer.self_attn.k_proj.weight = layer.self_attn.k_proj.weight * mx.tile(gains, 2)[:, None]
    with_balance, without = (tqext.calibrate(model, "tq3", balance=on, guard=True).layers for on in (True, False))
    for (path, recipe), c in with_balance.items():
        plain = without[path, Recipe(key_bits=recipe.key_bits, balance=False)]
        assert c.score_error < plain.score_error * 0.75, path


# Guard


@pytest.mark.parametrize("pairs", [range(24, 32), range(8)], ids=["slow", "fast"])
def test_guard_catches_a_key_bias_that_the_recipe_cannot_code(pairs):
    """Large biases, where they hardly turn and where they turn within a few tokens, and neither means nor balance."""
    model = with_key_bias(pairs)
    report = judged(model, get_policy("tq3", **OFF))
    first, *others = report.layers
    assert first.recipe is None or first.recipe.key_bits == 4
    assert re.search(r"bit.* keys.* output error .*, score error .* nats|with 3 bits output error", first.note or first.reason)
    assert all(layer.recipe == get_policy("tq3", **OFF).recipe for layer in others)
    assert (first.note or first.reason) in str(report)
    assert (first.note or first.reason) in report.table()
    cache = tqext.make_prompt_cache(model, "tq3", **OFF)
    assert [getattr(c, "recipe", None) for c in cache] == [layer.recipe for layer in report.layers]
    with pytest.raises(PathError, match=r"layer 0: not accurate: output error .* nats"):
        tqext.verify(model, "tq3", **OFF, guard=False)
    tqext.verify(model, "tq3", **OFF)


def test_means_and_balance_code_a_bias_that_hardly_turns():
    report = judged(with_key_bias(range(24, 32)), get_policy("tq33"))
    assert [layer.recipe for layer in report.layers] == [get_policy("tq33").recipe] * 3, report.table()


def test_guard_sees_what_happens_far_from_the_start():
    """One mean and a bias in middling pairs: accurate at position 0, not at the end of a long context."""
    model = with_key_bias(range(8, 14), max_position_embeddings=65536)
    near, far = (tqext.calibrate(m, "tq3", means=False, guard=True).layers for m in (with_key_bias(range(8, 14)), model))
    assert near.keys() == far.keys()
    at = calibration.offsets(model)
    assert at[-1] == 65536 - N_TOKENS


def test_guard_steps_up_once_more_where_four_bits_do_not_help():
    """A layer whose values are not finite is left alone."""
    model = make_llama()
    model.layers[1].self_attn.v_proj.weight = model.layers[1].self_attn.v_proj.weight * mx.inf
    report = judged(model, get_policy("tq3"))
    assert report.layers[1].recipe is None
    assert "compression is not accurate here: with 4-bit keys output error inf" in report.layers[1].reason


def test_guard_off_takes_the_recipe_as_it_is():
    report = judged(with_key_bias(range(8)), get_policy("tq3", **OFF, guard=False))
    assert [layer.recipe.key_bits for layer in report.layers] == [3] * 3
    assert not any(layer.note for layer in report.layers)


def test_no_balance_and_no_guard_need_no_calibration(runs):
    tqext.make_prompt_cache(make_llama(), "tq3", **OFF, guard=False)
    assert runs == []


def sharp_model():
    """Key biases in every rotary pair: without block means and balance, 3-bit codes lose what the keys differ in."""
    model = make_biased_qwen2(0.0)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = mx.random.normal(layer.self_attn.k_proj.bias.shape, key=mx.random.key(5)) * 60
    return model


def test_guard_steps_up_what_is_not_accurate(capfd):
    reduced = dict(means=False, balance=False)
    model = sharp_model()
    assert all(not layer.accurate for layer in layers_of(model, **reduced))
    report = tqext.mlx_lm.report(tqext.attach(model, **reduced))
    assert not report.compressed or all(layer.note for layer in report.compressed)
    assert "not accurate" in report.table() or "stepped up" in report.table()
    unguarded = tqext.mlx_lm.report(tqext.attach(model, guard=False, **reduced))
    assert len(unguarded.compressed) == 3
    with pytest.raises(PathError, match="not accurate"):
        tqext.verify(model, guard=False, **reduced)


@pytest.mark.parametrize("preset", ["tq3", "tq33", "tq4", "tq2"])
def test_guard_leaves_accurate_layers_alone(preset):
    report = tqext.mlx_lm.report(tqext.attach(make_llama(), preset))
    assert [layer.note for layer in report.compressed] == [""] * 3


def test_report_of_a_model_that_is_not_attached_says_so():
    with pytest.raises(ValueError, match=r"^\[report\] model: expected an attached model, got Model$"):
        tqext.mlx_lm.report(make_llama())


# Models


@pytest.mark.covering(share=3)
@pytest.mark.parametrize("kind", [kind for kind, (n, _) in {**zoo.PLAIN, **zoo.SPECIAL}.items() if n])
def test_every_kind_of_model_is_calibrated(kind):
    """Hybrid layers, windows, shared keys and values: what the probe compresses has a balance of its shape."""
    n_compressed, changes = {**zoo.PLAIN, **zoo.SPECIAL}[kind]
    model = zoo.make(kind, changes)
    policy = get_policy("tq33", guard=False)
    report = judged(model, policy)
    assert len(report.compressed) == n_compressed
    for layer in report.compressed:
        c = layer.calibration
        assert c.balance.shape == (layer.n_kv_heads, layer.head_dim)
        assert 0 < c.output_error < 1 and 0 < c.score_error < np.inf, (layer.path, str(c))  # 1: nothing is left of it
    caches = dict(members(tqext.make_prompt_cache(model, policy)))
    for layer in report.compressed:
        assert mx.array_equal(caches[layer.path].balance, layer.calibration.balance)


def as_type(dtype):
    model = make_llama()
    model.update(tree_map(lambda p: p.astype(dtype), model.parameters()))
    return model


def quantised(bits):
    model = make_llama()
    nn.quantize(model, group_size=64, bits=bits)
    return model


@pytest.mark.parametrize(
    ("make", "close"),
    [
        (lambda: as_type(mx.float16), 0.01),
        (lambda: as_type(mx.bfloat16), 0.05),
        (lambda: quantised(8), 0.02),
        (lambda: quantised(4), 0.3),
    ],
    ids=["fp16", "bf16", "8 bits", "4 bits"],
)
def test_weights_of_all_types_give_the_balance(make, close):
    expected, got = balances(make_llama()), balances(make())
    for path, b in expected.items():
        assert np.abs(got[path] / b - 1).max() < close, path


def test_one_bit_weights_are_calibrated():
    assert {b.shape for b in balances(make_one_bit()).values()} == {(2, 64)}


def test_a_model_that_cannot_be_run_says_how_to_go_without(monkeypatch):
    class Short(llama.Model):
        def __call__(self, inputs, cache=None):
            if inputs.shape[1] > 100:
                raise ValueError("too long")
            return super().__call__(inputs, cache=cache)

    model = Short(llama.ModelArgs.from_dict(CONFIG))
    with pytest.raises(RuntimeError, match=r"\[calibrate\] .* ValueError: too long; balance=False with guard=False"):
        tqext.make_prompt_cache(model)
    tqext.make_prompt_cache(model, balance=False, guard=False)


# Caches


def test_every_way_to_a_cache_uses_the_balance(tmp_path):
    model = make_llama()
    expected = balances(model)

    def check(caches):
        for path, c in enumerate(caches):
            assert type(c).__name__.endswith("TurboQuantKVCache")
            assert np.array_equal(np.array(c.balance), expected[str(path)])

    made = tqext.make_prompt_cache(model)
    check(made)
    check(tqext.attach(model).make_cache())
    tqext.detach(model)
    upgraded = stock_cache(model)
    logits_after(model, upgraded, prompt(200))
    check(tqext.upgrade(upgraded, model=model))
    logits_after(model, made, prompt(200))
    stock.save_prompt_cache(str(tmp_path / "cache.safetensors"), made)
    check(stock.load_prompt_cache(str(tmp_path / "cache.safetensors")))
    check([TurboQuantKVCache.merge([a, b]) for a, b in zip(made, upgraded, strict=True)])


# What is kept


def test_calibration_is_made_once(runs, capfd):
    model = make_llama()
    first = tqext.calibrate(model)
    assert len(runs) == 1 and first.seconds > 0
    assert "calibrated 3 layers in" in capfd.readouterr().err
    again = tqext.calibrate(model)
    calibration._kept.clear()
    from_disk = tqext.calibrate(make_llama())
    assert len(runs) == 1
    assert capfd.readouterr().err == ""
    for other in (again, from_disk):
        assert other.seconds == 0
        assert other.layers == first.layers
        for key, c in other.layers.items():
            assert mx.array_equal(c.balance, first.layers[key].balance)
    assert len(list(calibration.folder().iterdir())) == 1, "no scratch file is left"


def test_calibration_is_the_same_in_every_run():
    first = tqext.calibrate(make_llama()).layers
    mx.random.seed(1)
    calibration._kept.clear()
    next(calibration.folder().iterdir()).unlink()
    again = tqext.calibrate(make_llama()).layers
    for key, c in again.items():
        assert np.allclose(np.array(c.balance), np.array(first[key].balance), rtol=1e-5)
        assert c.output_error == pytest.approx(first[key].output_error, rel=1e-3)


@pytest.mark.parametrize(
    "other",
    [
        lambda: make_llama(1),
        lambda: make_llama(rope_theta=5e5),
        lambda: make_llama(max_position_embeddings=1024),
        lambda: as_type(mx.float16),
    ],
    ids=["weights", "rope_theta", "context", "type"],
)
def test_other_models_are_calibrated_on_their_own(other, runs):
    tqext.calibrate(make_llama(max_position_embeddings=2048))
    tqext.calibrate(other())
    assert len(runs) == 2


def test_what_decides_the_errors_is_part_of_the_key(runs):
    model = make_llama()
    for overrides in ({}, dict(value_coding="lloyd", value_bits=3), dict(means=False), dict(layers={1: None})):
        tqext.calibrate(model, **overrides)
    assert len(runs) == 4
    for overrides in (dict(tail=32), dict(first=4)):  # not how many tokens stay exact
        found = tqext.calibrate(model, **overrides)
        assert {recipe for _, recipe in found.layers} >= {Recipe(**overrides)}
    assert len(runs) == 4


def damage(file, how):
    data = bytearray(file.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "flipped":
        data[-20] ^= 64
    else:
        data[12] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "header"])
def test_a_damaged_file_is_made_again(how, runs):
    first = tqext.calibrate(make_llama())
    (file,) = calibration.folder().iterdir()
    whole = file.read_bytes()
    damage(file, how)
    calibration._kept.clear()
    again = tqext.calibrate(make_llama())
    assert len(runs) == 2
    for key, c in again.layers.items():
        assert mx.allclose(c.balance, first.layers[key].balance)
    assert len(file.read_bytes()) == len(whole)


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(monkeypatch, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(calibration, "folder", lambda: tmp_path / "file")
    assert balances(make_llama())
    assert "not kept: " in capfd.readouterr().err


def test_threads_wait_for_one_calibration(runs):
    model = tqext.attach(make_llama())
    caches, errors = [], []

    def make():
        try:
            with mx.stream(mx.new_stream(mx.default_device())):
                caches.append(model.make_cache())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert len(runs) == 1
    assert len({id(c[0].balance) for c in caches}) == 1


def test_another_thread_goes_on_while_one_calibrates():
    """The model's layers are lent to the calibrating thread alone."""
    model = make_llama()
    expected = logits_after(model, stock_cache(model), prompt(40))
    mx.eval(expected)
    answers, stop = [], threading.Event()

    def generate():
        with mx.stream(mx.new_stream(mx.default_device())):
            while not stop.is_set():
                got = logits_after(model, stock_cache(model), prompt(40))
                answers.append(bool(mx.array_equal(got, expected).item()))

    thread = threading.Thread(target=generate)
    thread.start()
    for preset in ("tq3", "tq33", "tq4"):
        tqext.calibrate(model, preset)
    stop.set()
    thread.join()
    assert answers and all(answers)
    assert {type(m) for _, m in model.named_modules()}.isdisjoint({blas._LinearForNow, blas._QuantizedLinearForNow})


# Products in fp32


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [None, 4])
def test_products_with_numpy_are_the_layers(dtype, bits, monkeypatch):
    monkeypatch.setattr(blas, "is_faster", lambda: True)
    layers = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64, bias=False))
    layers.update(tree_map(lambda p: p.astype(dtype), layers.parameters()))
    if bits:
        nn.quantize(layers, group_size=32, bits=bits)
    x = mx.random.normal((2, 5, 64)).astype(dtype)
    exact = nn.Sequential(*(nn.Linear(*shape, bias=bias) for shape, bias in (((64, 96), True), ((96, 64), False))))
    for a, b in zip(exact.layers, layers.layers, strict=True):
        how = dict(group_size=32, bits=bits, dtype=mx.float32)
        a.weight = mx.dequantize(b.weight, b.scales, b.biases, **how) if bits else b.weight.astype(mx.float32)
        if "bias" in b:
            a.bias = b.bias.astype(mx.float32)
    expected = exact(x.astype(mx.float32))
    with blas.products(layers, skip_rows=64):
        assert [type(m) is nn.Linear or type(m) is nn.QuantizedLinear for m in layers.layers] == [False, True]
    with blas.products(layers):
        got = layers(x)
    assert got.dtype == mx.float32
    assert mx.abs(got - expected).max() <= 1e-5
    assert all(type(m) in (nn.Linear, nn.QuantizedLinear) for m in layers.layers)


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("mask", [None, "causal", "bool", "added"])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_with_numpy_is_mlx_attention(faster, mask, sinks, monkeypatch):
    monkeypatch.setattr(blas, "is_faster", lambda: faster)
    q, k, v = (mx.random.normal((2, heads, n, 32)) for heads, n in ((6, 7), (3, 20), (3, 20)))
    if mask == "bool":
        mask = mx.random.uniform(shape=(2, 1, 7, 20)) > 0.3
    elif mask == "added":
        mask = mx.random.normal((7, 20))
    logits = mx.random.normal((6,)) if sinks else None
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask=mask, sinks=logits)
    assert mx.allclose(blas.attention(q, k, v, scale=0.2, mask=mask, sinks=logits), expected, atol=1e-5)
