"""shared_prefix_attention: sequences that begin with the same tokens, of which there is one copy, against float64."""

import re

import mlx.core as mx
import numpy as np
import pytest

import reference
import tqext
from support import DTYPES, KERNEL_TOLERANCE, Problem, assert_close, decoded_keys, decoded_values, error_line, to_numpy

pytestmark = pytest.mark.usefixtures("device")


class Shared:
    """A prefix, and each sequence's own tokens behind it; `whole` answers from copies of the prefix."""

    def __init__(self, n_prefix=200, n_coded=130, n_first=4, n_tail=9, options=None, **sizes):
        self.own = Problem(n_coded=n_coded, n_tail=n_tail, n_first=0, options=options or {}, **sizes)
        same = {**sizes, "batch": 1, "seed": 1, "sinks": False}
        self.prefix = Problem(n_coded=n_prefix, n_first=n_first, **same)
        if self.own.packed_k.balance is not None:  # a layer has one balance
            balance, packed = self.own.packed_k.balance, self.prefix.packed_k
            keys = tqext.dequantize(packed) * (packed.balance / balance)[:, None]
            means = tqext.block_means(keys)
            self.prefix.packed_k = tqext.quantize_keys(
                keys, bits=packed.bits, means=means, balance=balance, rotation=packed.rotation
            )

    def run(self, **changes):
        own, prefix = self.own, self.prefix
        given = {**own.arguments(), "first": prefix.first, **changes}
        given.pop("left_padding", None)
        q, k, v = (given.pop(name, x) for name, x in (("q", own.q), ("packed_k", own.packed_k), ("packed_v", own.packed_v)))
        return tqext.shared_prefix_attention(q, prefix.packed_k, prefix.packed_v, k, v, **given)

    def answer(self):
        """float64 over the decoded tokens of prefix and own, sequence by sequence."""
        own, prefix = self.own, self.prefix
        n, out = prefix.n_keys, []
        for b in range(own.batch):
            keys, values = (np.concatenate([decode(p)[0 if p.codes.shape[0] == 1 else b] for p in packs], 1)[None]
                            for decode, packs in ((decoded_keys, (prefix.packed_k, own.packed_k)),
                                                  (decoded_values, (prefix.packed_v, own.packed_v))))  # fmt: skip
            tail = None if own.tail is None else tuple(to_numpy(x)[b : b + 1] for x in own.tail)
            first = None if prefix.first is None else tuple(to_numpy(x) for x in prefix.first)
            mask, lengths = own.options.get("mask"), own.options.get("lengths")
            if isinstance(mask, mx.array):
                mask = to_numpy(mask)[b : b + 1]
                before = np.full((*mask.shape[:3], n), mask.dtype == bool, mask.dtype)  # every query sees the prefix
                mask = np.concatenate([before, mask], -1)
            if lengths is not None:
                counts = to_numpy(lengths)[b]
                lengths = np.array([[prefix.n_first, prefix.n_coded + counts[0], counts[1]]])
            sinks = None if own.sink_logits is None else to_numpy(own.sink_logits)
            out.append(
                reference.attention(
                    to_numpy(own.q)[b : b + 1], keys, values, scale=own.scale, mask=mask, tail=tail, sinks=sinks, first=first,
                    lengths=lengths,
                )
            )  # fmt: skip
        return np.concatenate(out)

    def check(self):
        assert_close(self.run(), self.answer(), KERNEL_TOLERANCE[self.own.dtype])


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 2, 5, 40])
def test_shared_prefix_every_number_of_queries(n_rows, dtype):
    for batch, n_repeats in ((1, 4), (3, 1), (8, 4)):
        Shared(batch=batch, n_rows=n_rows, n_repeats=n_repeats, n_tail=50, head_dim=64, means=True, dtype=DTYPES[dtype],
               options={"mask": "causal"}).check()  # fmt: skip


@pytest.mark.covering
@pytest.mark.parametrize("key_bits, value_bits, coding", [(3, 2, "groups"), (3, 3, "lloyd"), (4, 4, "lloyd")])
@pytest.mark.parametrize("head_dim, value_dim", [(80, 80), (128, 96), (288, 320)])
def test_shared_prefix_formats(head_dim, value_dim, key_bits, value_bits, coding):
    for rotation in ("hadamard",) if head_dim != 80 else ("hadamard", "orthogonal", "none"):
        Shared(
            batch=2, head_dim=head_dim, value_dim=value_dim, key_bits=key_bits, value_bits=value_bits, value_coding=coding,
            means=True, balance=True, rotation=rotation, sinks=True,
        ).check()  # fmt: skip


@pytest.mark.parametrize("n_prefix, n_coded, n_first, n_tail", [(0, 64, 3, 0), (1, 0, 0, 1), (5000, 1, 0, 0), (64, 0, 0, 0)])
def test_shared_prefix_lengths_of_the_parts(n_prefix, n_coded, n_first, n_tail):
    for sinks in (False, True):
        Shared(n_prefix, n_coded, n_first, n_tail, batch=3, head_dim=64, means=True, sinks=sinks).check()


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_shared_prefix_masks_and_lengths(kind, rng):
    shared = Shared(batch=3, n_rows=4, head_dim=64, n_coded=130, n_tail=20, means=True)
    allowed = rng.random((3, 1, 4, 150)) < 0.5
    numbers = np.where(allowed, rng.normal(size=allowed.shape), -np.inf).astype(np.float32)
    shared.own.options = {"mask": mx.array(allowed if kind == "bool" else numbers)}
    shared.check()
    shared.own.options = {"mask": "causal", "lengths": mx.array([[130, 16], [0, 0], [65, 3]])}
    shared.check()


def test_shared_prefix_of_nothing_at_all_is_zero():
    shared = Shared(0, 0, 0, 0, batch=2, head_dim=64)
    assert not to_numpy(shared.run()).any()
    shared = Shared(0, 40, 0, 0, batch=2, head_dim=64)
    assert not to_numpy(shared.run(lengths=mx.array([[0, 0], [0, 0]]))).any()


def test_shared_prefix_far_above_the_own_tokens():
    """One part's weights vanish beside the other's: no overflow, and what remains is right."""
    for factor in (30.0, 1e-3):
        shared = Shared(batch=2, head_dim=64, n_tail=0)
        shared.prefix.packed_k = shared.prefix.packed_k._replace(
            norms=(shared.prefix.packed_k.norms * factor).astype(mx.float16)
        )
        shared.check()


def test_shared_prefix_nan_reaches_the_rows_that_attend_to_it():
    shared = Shared(batch=2, head_dim=64)
    keys, values = shared.own.tail
    keys[1, 0, 3] = np.nan
    got = np.isnan(to_numpy(shared.run(tail=(keys, values))))
    assert got[1, :4].all() and not got[0].any() and not got[1, 4:].any()


def test_shared_prefix_under_compile():
    shared = Shared(batch=3, head_dim=64, means=True, n_tail=4)
    call = mx.compile(lambda q, tail: shared.run(q=q, tail=tail))
    assert_close(call(shared.own.q, shared.own.tail), to_numpy(shared.run()), 1e-6)


def bad(argument, **changes):
    return pytest.param(argument, changes, id=f"{argument} {', '.join(changes)}")


@pytest.mark.parametrize(
    "argument, changes",
    [
        bad("q", q=mx.zeros((8, 1, 64))),
        bad("q", q="q"),
        bad("prefix_k.codes", batch=2),
        bad("prefix_k.codes", heads=4),
        bad("prefix_v", value_dim=32),
        bad("prefix_k", prefix_k=mx.zeros((1, 2, 3, 4))),
        bad("lengths", lengths=mx.array([[1, 2, 3]])),
        bad("lengths", lengths=3),
    ],
)
def test_shared_prefix_rejects(argument, changes):
    own, sizes = Problem(batch=2, head_dim=64), {"batch": 1, "n_kv_heads": 2, "head_dim": 64}
    if "heads" in changes:
        sizes["n_kv_heads"] = changes.pop("heads")
    for name in ("batch", "value_dim"):
        if name in changes:
            sizes[name] = changes.pop(name)
    prefix = Problem(**sizes)
    given = {"q": own.q, "prefix_k": prefix.packed_k, "prefix_v": prefix.packed_v, "packed_k": own.packed_k,
             "packed_v": own.packed_v, **changes}  # fmt: skip
    with pytest.raises(ValueError, match=error_line("shared_prefix_attention", re.escape(argument))):
        tqext.shared_prefix_attention(**given)


def test_shared_prefix_takes_the_memory_of_one_copy():
    """A step of eight sequences takes no copy of the prefix, of which eight in one batch would be eight."""
    shared = Shared(50_000, 64, batch=8, head_dim=64, n_kv_heads=1, means=True, dtype=mx.float16)
    prefix = shared.prefix.packed_k.nbytes + shared.prefix.packed_v.nbytes
    mx.eval(shared.run(), shared.prefix.packed_k, shared.prefix.packed_v)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(shared.run())
    assert mx.get_peak_memory() - before < prefix / 4
