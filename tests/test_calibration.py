"""The calibration of a model: balance, errors by layer, the guard, and what is kept on disk."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import tqext
from support import to_numpy
from tiny import make_biased_qwen2, make_llama, make_qwen2
from tqext import calibration, mlx_lm
from tqext.presets import get_policy


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    mlx_lm.uninstall()


def kept_files(tmp_path):
    return sorted((tmp_path / "tqext" / "calibration").glob("*"))


def layers_of(model, preset="tq3", **overrides):
    recipe = get_policy(preset, **overrides).recipe
    found = tqext.calibrate(model, preset, **overrides).layers
    return [found[str(i), recipe] for i in range(3)]


def exact_steps(model, shift):
    """Queries and keys of every layer at one offset, taken from the model's own modules."""
    tokens = calibration.prompt()
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


def test_calibration_balance_is_the_formula():
    """From queries and keys that another forward pass yields, in float64."""
    model = make_qwen2(max_position_embeddings=4096)
    at = calibration.offsets(model)
    assert at[0] == 0 and at[-1] == 4096 - 512 and len(at) == 6
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


def test_calibration_lowers_the_scores_error():
    model = make_qwen2()
    for with_balance, without in zip(layers_of(model), layers_of(model, balance=False), strict=True):
        assert without.balance is None and with_balance.balance is not None
        assert with_balance.score_error <= 1.02 * without.score_error


def test_calibration_errors_fall_with_the_bits():
    model = make_llama()
    by_bits = [[layer.score_error for layer in layers_of(model, preset)] for preset in ("tq2", "tq33", "tq4")]
    for two, three, four in zip(*by_bits, strict=True):
        # The codebooks' distortions: 0.116, 0.034, 0.0093.
        assert two / three == pytest.approx((0.131 / 0.0352) ** 0.5, rel=0.15)
        assert three / four == pytest.approx((0.0352 / 0.0094) ** 0.5, rel=0.15)


def test_calibration_is_kept_and_the_same_when_read(tmp_path, capfd):
    model = make_llama()
    first = layers_of(model)
    assert "calibrated 3 layers" in capfd.readouterr().err
    assert len(kept_files(tmp_path)) == 1
    again = layers_of(model)
    assert capfd.readouterr().err == ""
    for a, b in zip(first, again, strict=True):
        assert a == b and np.array_equal(to_numpy(a.balance), to_numpy(b.balance))


def test_calibration_of_other_weights_or_codes_is_another(tmp_path):
    layers_of(make_llama())
    layers_of(make_llama(seed=1))
    layers_of(make_llama(), "tq33")
    assert len(kept_files(tmp_path)) == 3
    layers_of(make_llama(), tail=128, first=4)  # how many tokens stay exact does not matter
    assert len(kept_files(tmp_path)) == 3


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_calibration_that_is_damaged_is_made_again(damage, tmp_path, capfd):
    first = layers_of(make_llama())
    (file,) = kept_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    again = layers_of(make_llama())
    assert capfd.readouterr().err.count("calibrated 3 layers") == 2
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(to_numpy(a.balance), to_numpy(b.balance))


def test_calibration_reaches_the_caches():
    model = tqext.attach(make_llama(), "tq33")
    for layer, cache in zip(layers_of(make_llama(), "tq33"), make_prompt_cache(model), strict=True):
        assert np.array_equal(to_numpy(cache.balance), to_numpy(layer.balance))


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
    report = mlx_lm.report(tqext.attach(model, **reduced))
    assert not report.compressed or all(layer.note for layer in report.compressed)
    assert "not accurate" in report.table() or "stepped up" in report.table()
    unguarded = mlx_lm.report(tqext.attach(model, guard=False, **reduced))
    assert len(unguarded.compressed) == 3
    with pytest.raises(mlx_lm.PathError, match="not accurate"):
        tqext.verify(model, guard=False, **reduced)


@pytest.mark.parametrize("preset", ["tq3", "tq33", "tq4", "tq2"])
def test_guard_leaves_accurate_layers_alone(preset):
    report = mlx_lm.report(tqext.attach(make_llama(), preset))
    assert [layer.note for layer in report.compressed] == [""] * 3


def test_report_of_a_model_that_is_not_attached_says_so():
    with pytest.raises(ValueError, match=r"^\[report\] model: expected an attached model, got Model$"):
        mlx_lm.report(make_llama())
