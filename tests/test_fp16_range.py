"""Keys and values beyond fp16, in models of wider types: coded as well as any, or left uncompressed by the guard."""

import mlx.core as mx
import numpy as np
import pytest

import tqext
import tqext.mlx_lm
from tiny import logits_after, make_llama, prompt
from tqext.fp16_range import HEADROOM, LARGEST, SMALLEST, fits_fp16

pytestmark = pytest.mark.usefixtures("uninstalled", "no_kept_calibration")
TOKENS = prompt(230, vocab=127)


def make_model(keys, values, dtype):
    """A model that computes the same whatever these powers of two: they are taken back by the queries and by the output."""
    model = make_llama(num_hidden_layers=1, vocab_size=128, intermediate_size=64)
    model.set_dtype(mx.float32)
    a = model.layers[0].self_attn
    for projection, exponent in ((a.k_proj, keys), (a.q_proj, -keys), (a.v_proj, values), (a.o_proj, -values)):
        projection.weight = projection.weight * 2.0**exponent
    model.set_dtype(dtype)
    return model


def answers(model, preset, **overrides):
    """Logits of the last tokens, compressed, and the report."""
    tqext.attach(model, preset, **overrides)
    report = tqext.mlx_lm.report(model)
    logits = logits_after(model, tqext.make_prompt_cache(model, preset, **overrides), TOKENS, chunk=100)[-20:]
    return np.array(logits), report


@pytest.mark.parametrize(
    "dtype, preset, exponents",
    [(mx.float32, "tq3", (-60, -8, 8, 20)), (mx.bfloat16, "tq33", (-20, 8))],
    ids=["float32", "bfloat16"],
)
def test_every_size_is_coded_as_well_or_refused(dtype, preset, exponents):
    want, report = answers(make_model(0, 0, dtype), preset)
    assert len(report.compressed) == 1
    plain = make_model(0, 0, dtype)
    exact = np.array(logits_after(plain, tqext.mlx_lm.stock_cache(plain), TOKENS, chunk=100)[-20:])
    lost = np.abs(want - exact).mean()
    assert lost > 0
    compressed = set()
    for what in ("keys", "values"):
        for exponent in exponents:
            model = make_model(*(exponent if name == what else 0 for name in ("keys", "values")), dtype)
            got, report = answers(model, preset)
            if report.compressed:
                compressed.add((what, exponent))
                assert np.abs(got - exact).mean() <= 1.1 * lost, (what, exponent)
            else:
                assert f"({what} beyond the range of fp16)" in report.table(), (what, exponent)
                assert np.abs(got - exact).mean() < 0.1 * lost
    # Sizes of real models are taken, what no fp16 number holds is not.
    assert {(what, e) for what in ("keys", "values") for e in (-8, 8) if e in exponents} <= compressed
    assert not any(abs(e) >= 20 for _, e in compressed)


def test_without_the_guard_it_is_said_and_stays_finite():
    model = make_model(0, 20, mx.float32)
    logits, report = answers(model, "tq33", guard=False)
    assert len(report.compressed) == 1
    assert "values beyond the range of fp16" in report.table()
    assert np.isfinite(logits).all()
    with pytest.raises(tqext.mlx_lm.PathError, match="beyond the range of fp16"):
        tqext.verify(model, "tq33", guard=False)


@pytest.mark.parametrize("coding, bits", [("groups", 2), ("groups", 4), ("lloyd", 3)])
@pytest.mark.parametrize("means", [False, True])
def test_range_is_that_of_the_formats_numbers(coding, bits, means, rng):
    """At its ends tokens that are `HEADROOM` times larger or smaller are still coded as well."""
    x = mx.array(rng.normal(size=(1, 2, 128, 64)).astype(np.float32)) + 0.5

    def packed(x):
        k = tqext.quantize_keys(x, means=tqext.block_means(x) if means else None)
        return k, tqext.quantize_values(x, bits=bits, coding=coding)

    def errors(x):
        exact = np.array(x, np.float64)
        return [np.sqrt(((np.array(tqext.dequantize(p), np.float64) - exact) ** 2).sum() / (exact**2).sum()) for p in packed(x)]

    ordinary = errors(x)
    sizes = 2.0 ** np.arange(-30, 30)
    fits = [tuple(bool(y.item()) for y in fits_fp16(x * s, x * s, *packed(x * s))) for s in sizes]
    for i in range(2):
        inside = [s for s, fit in zip(sizes, fits, strict=True) if fit[i]]
        assert inside == [s for s in sizes if inside[0] <= s <= inside[-1]]
        assert inside[0] <= SMALLEST and inside[-1] >= LARGEST / 2**9
        for s in (inside[0] / HEADROOM, inside[0], inside[-1], inside[-1] * HEADROOM):
            assert errors(x * float(s))[i] == pytest.approx(ordinary[i], rel=0.1), s


def test_zeros_fit_and_what_is_no_number_does_not():
    for value, fit in ((0.0, True), (1.0, True), (np.nan, False), (np.inf, False), (1e5, False), (1e-30, False)):
        x = mx.full((1, 1, 64, 32), value)
        found = fits_fp16(x, x, tqext.quantize_keys(x), tqext.quantize_values(x))
        assert [bool(y.item()) for y in found] == [fit, fit], value
