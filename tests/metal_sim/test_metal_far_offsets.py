"""Sequences so far apart that offsets, in whatever they are counted, do not fit 32 bits.

The memory between the sequences is zeros that nobody has touched, so it takes none. An offset that is cut to 32 bits leads
there: the result is wrong.
"""

import copy
import functools
import mmap
import re

import metal_ops
import mlx.core as mx
import numpy as np
import pytest
from mutations import ATTENTION, ENCODE, LATENT, PROMPT, attention

import test_latent_attention as latents
import tqext
from support import KERNEL_TOLERANCE, Problem, assert_close, token_lists

GAP = (1 << 32) + (1 << 20)  # numbers, or bytes of words of codes
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux


def far(x, words=True):
    """A view of the same numbers whose sequences are GAP of them apart; of words of codes, GAP bytes."""
    x = np.array(x)
    gap = GAP * (1 if x.itemsize == 4 and words else x.itemsize)
    space = mmap.mmap(-1, gap * (len(x) - 1) + x[0].nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    view = np.lib.stride_tricks.as_strided(np.frombuffer(space, x.dtype), x.shape, (gap, *x.strides[1:]))
    view[...] = x
    return view


PARTS = (
    *("q", "mask", "key_codes", "key_norms", "means", "key_signs", "residual_norms", "value_codes", "value_params"),
    *("first_keys", "first_values", "tail_keys", "tail_values"),
)


@functools.cache
def problem_and_answer(kernel, listed=False):
    problem = Problem(
        batch=2, n_kv_heads=1, n_repeats=2 if kernel == "split" else 5, n_rows=1 if kernel == "split" else 4, n_coded=100,
        head_dim=64, n_first=3, n_tail=9, means=True, balance=True, qjl=True, dtype=mx.float16,
    )  # fmt: skip
    hidden = np.random.default_rng(0).random((2, problem.q.shape[1], problem.n_rows, problem.n_keys)) < 0.2
    problem.options["mask"] = mx.array(~hidden)
    if listed:
        problem.options["indices"] = token_lists(problem, 40, per_query=False)
    return problem, problem.answer()


def check_attention(device, kernel, part):
    """With one of the arrays far apart."""
    listed = part == "indices"
    problem, want = problem_and_answer("matrix" if listed else kernel, listed)
    problem, device.kernel = copy.copy(problem), kernel
    if listed:
        device.kernel, problem.options = "matrix", {**problem.options, part: far(problem.options[part], words=False)}
    elif part == "q":
        problem.q = far(problem.q)
    elif part == "mask":
        problem.options = {"mask": far(problem.options["mask"])}
    elif part.startswith(("first", "tail")):
        name, which = part.split("_")
        pair = [np.array(x) for x in getattr(problem, name)]
        i = which == "values"
        pair[i] = far(pair[i])
        setattr(problem, name, tuple(pair))
    else:
        packed, field = ("packed_v" if "value" in part else "packed_k"), re.sub("^(key|value)_", "", part)
        setattr(problem, packed, getattr(problem, packed)._replace(**{field: far(getattr(getattr(problem, packed), field))}))
    assert_close(attention(device, problem), want, KERNEL_TOLERANCE[mx.float16])


@functools.cache
def latents_and_answer():
    problem = latents.Problem(
        dim=256, batch=2, n_repeats=3, n_rows=2, n_coded=100, n_first=3, n_tail=9, balance=True, rope_dim=None, dtype=mx.float16
    )
    mask = problem.rng.random(problem.full) > 0.2
    return problem, mask, problem.answer(mask)


def check_latents(device, part):
    """With one of the arrays far apart."""
    problem, mask, want = latents_and_answer()
    arrays = dict(q=problem.q, first_keys=problem.first, tail_keys=problem.tail, mask=mx.array(mask))
    packed = problem.packed
    if part in arrays:
        arrays[part] = far(arrays[part])
    elif part:
        field = part.removeprefix("key_")
        packed = packed._replace(**{field: far(getattr(packed, field))})
    tokens = dict(first=arrays["first_keys"], tail=arrays["tail_keys"])
    out = metal_ops.latent_attention(device, arrays["q"], packed, scale=latents.SCALE, mask=arrays["mask"], **tokens)
    assert_close(out, want, KERNEL_TOLERANCE[mx.float16])


@functools.cache
def tokens():
    rng = np.random.default_rng(1)
    x = mx.array(rng.normal(size=(2, 1, 100, 64)).astype(np.float32) + 1).astype(mx.float16)
    means = tqext.block_means(x) + mx.array(rng.normal(size=(2, 1, 2, 64)).astype(np.float16))
    keys, values = tqext.quantize_keys(x, means=means), tqext.quantize_values(x, coding="lloyd", bits=3)
    return x, means, keys, values, tqext.dequantize(values)


def check_encoding(device, part):
    x, means, keys, values, decoded = tokens()
    if part in ("in", "means"):
        x, means = far(x) if part == "in" else x, far(means) if part == "means" else means
        for got, want in zip(metal_ops.quantize_keys(device, x, means=means), (keys.codes, keys.norms), strict=True):
            assert mx.array_equal(got, want).item()
    else:
        packed = values._replace(**{part: far(getattr(values, part))})
        assert mx.array_equal(metal_ops.dequantize(device, packed), decoded).item()


def test_a_list_at_offsets_beyond_32_bits():
    check_attention(metal_ops.Device("fast"), "matrix", "indices")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kernel", ["split", "matrix", "prompt32"])
def test_attention_at_offsets_beyond_32_bits(kernel, part):
    check_attention(metal_ops.Device("fast"), kernel, part)


LATENT_PARTS = "q", "mask", "key_codes", "key_norms", "means", "first_keys", "tail_keys"


@pytest.mark.parametrize("part", LATENT_PARTS)
def test_latents_at_offsets_beyond_32_bits(part):
    check_latents(metal_ops.Device("fast"), part)


@pytest.mark.parametrize("part", ["in", "means", "codes", "params"])
def test_encoding_at_offsets_beyond_32_bits(part):
    check_encoding(metal_ops.Device("fast"), part)


# --- every such offset, cut to 32 bits ---------------------------------------------------------------------------------

CONSTANT = 99  # a function constant that no kernel of ours has
OFFSET = re.compile(r"((?:\+= |= |return |= q \+ ))((?:\([^()]*\) \* |4 \* )?\(?batch \* [^;]*);")


def with_cuts(text):
    """The source with a function constant that says which of its offsets is cut, and the offsets."""
    cuts = []

    def cut(match):
        cuts.append(match.group(2))
        return f"{match.group(1)}cut_to_32_bits({len(cuts) - 1}, {match.group(2)});"

    text = OFFSET.sub(cut, text)
    helper = f"""constant int which_cut [[function_constant({CONSTANT})]];
inline long cut_to_32_bits(int i, long offset) {{ return which_cut == i ? long(int(offset)) : offset; }}
"""
    assert len(cuts) == text.count("batch *")
    return text.replace("using namespace metal;\n", "using namespace metal;\n" + helper, 1), cuts


SOURCES = {
    "turboquant_attention": ATTENTION,
    "turboquant_prompt": PROMPT,
    "latent_attention": LATENT,
    "turboquant_encode": ENCODE,
}
CUTS = {name: with_cuts(text) for name, text in SOURCES.items()}


class Cut(metal_ops.Device):
    """Runs a source with one of its offsets cut; -1: none."""

    def __init__(self, source, which):
        super().__init__("fast")
        self.sources, self.which = {source: CUTS[source][0]}, which

    def dispatch(self, plan, buffers):
        return super().dispatch({**plan, "constants": {**plan.get("constants", {}), str(CONSTANT): self.which}}, buffers)


def is_caught(source, which, part):
    kernels = {"turboquant_attention": ("split", "matrix"), "turboquant_prompt": ("prompt32",)}
    others = {"latent_attention": check_latents, "turboquant_encode": check_encoding}
    for kernel in kernels.get(source, (None,)):
        device = Cut(source, which)
        try:
            check_attention(device, kernel, part) if kernel else others[source](device, part)
        except AssertionError:
            return True
    return False


def part_of(offset):
    """The array that an offset is of, by the strides in it; those of exact tokens are handed over by name."""
    name = re.search(r"p\.(\w+)\.batch|(strides)\.batch", offset)
    if name.group(2):
        return "tail_values" if "d * strides.last" in offset else "tail_keys"
    return {"in_params": "params"}.get(name.group(1), name.group(1))


def is_read(source, offset):
    """Latents have no values of their own; what the attention kernels share moves pointers to values all the same."""
    return source != "latent_attention" or part_of(offset) in LATENT_PARTS


@pytest.mark.parametrize(
    "source, which",
    [(source, i) for source, (_, cuts) in CUTS.items() for i, offset in enumerate(cuts) if is_read(source, offset)],
)
def test_an_offset_of_32_bits_is_caught(source, which):
    offset = CUTS[source][1][which]
    print(offset)
    assert is_caught(source, which, part_of(offset))


@pytest.mark.parametrize("source", SOURCES)
def test_offsets_of_64_bits_pass_the_same_check(source):
    assert not is_caught(source, -1, "means")
