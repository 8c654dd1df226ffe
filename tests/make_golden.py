"""Writes data/golden_v2.json: packed bytes of format 2, made by reference.py alone.

Inputs are integers over 32, exact in fp32, fp16 and bf16. Every decision that decides a byte (a code, a sign, the rounding
of a parameter) is further from going the other way than fp32 arithmetic can err, so every backend must give the same bytes.

    python tests/make_golden.py
"""

import json
import pathlib

import numpy as np

import reference

PATH = pathlib.Path(__file__).parent / "data" / "golden_v2.json"
UNIT = 2.0**-5
N_TOKENS = 3
# Powers of two: the balance adds no rounding.
BALANCE = (0.25, 0.5, 1.0, 2.0, 4.0)
# Relative to the vector (keys), the step or the group's range (values); fp32 errs by a few times 1e-7.
MARGIN = 2e-6


def hexadecimal(words):
    width = words.dtype.itemsize
    bits = words.view(f"uint{8 * width}")
    return ["".join(f"{word:0{2 * width}x}" for word in row) for row in bits]


def draw(rng, dim):
    # Heavier tails than a normal law, as real keys have, and a size that changes from token to token.
    x = rng.standard_t(5, dim) * rng.uniform(8, 32)
    return np.clip(np.rint(x), -127, 127).astype(int)


def tokens_with_margin(rng, dim, encode, n_tokens=N_TOKENS, margin=MARGIN):
    """Integer vectors whose encoding, of token t by encode(vector, t), leaves the margin everywhere."""
    rows = []
    while len(rows) < n_tokens:
        row = draw(rng, dim)
        if encode(row[None] * UNIT, len(rows)).margin.min() > margin:
            rows.append(row)
    return np.array(rows)


def key_case(rng, dim, bits, *, n_tokens=N_TOKENS, means=False, balance=False, qjl=False, rotation="hadamard"):
    matrix = reference.dense_matrix(dim).astype(np.float64) if rotation == "orthogonal" else None
    n_blocks = -(-n_tokens // reference.BLOCK)
    centre = np.array([draw(rng, dim) for _ in range(n_blocks)]) if means else None
    factors = rng.choice(BALANCE, dim) if balance else None

    def encode(k, t):
        own = None if centre is None else centre[t // reference.BLOCK][None] * UNIT
        return reference.encode_keys(k, bits, own, factors, qjl, matrix)

    # A dense rotation in fp32 errs by the root of the dimension.
    rows = tokens_with_margin(rng, dim, encode, n_tokens, 10 * MARGIN if matrix is not None else MARGIN)
    keys = reference.encode_keys(rows * UNIT, bits, None if centre is None else centre * UNIT, factors, qjl, matrix)
    return {
        "kind": "keys",
        "head_dim": dim,
        "bits": bits,
        "rotation": rotation,
        "input": rows.tolist(),
        "means": None if centre is None else centre.tolist(),
        "balance": None if factors is None else factors.tolist(),
        "codes": hexadecimal(keys.codes),
        "norms": hexadecimal(keys.norms),
        "signs": hexadecimal(keys.signs) if qjl else None,
        "residual_norms": hexadecimal(keys.residual_norms) if qjl else None,
    }


def value_case(rng, dim, bits, coding):
    encode = reference.encode_values if coding == "groups" else reference.encode_values_lloyd
    rows = tokens_with_margin(rng, dim, lambda v, t: encode(v, bits))
    values = encode(rows * UNIT, bits)
    return {
        "kind": "values" if coding == "groups" else "lloyd",
        "head_dim": dim,
        "bits": bits,
        "input": rows.tolist(),
        "codes": hexadecimal(values.codes),
        "params": hexadecimal(values.params),
    }


def cases():
    rng = np.random.default_rng(20260101)
    for dim in (32, 64, 80, 96, 112, 128, 160, 224, 256, 512):
        for bits in (2, 3, 4):
            yield key_case(rng, dim, bits)
            if dim in (80, 128):
                yield key_case(rng, dim, bits, means=True)
                yield key_case(rng, dim, bits, means=True, balance=True, qjl=True)
        for bits in (2, 4):
            yield value_case(rng, dim, bits, "groups")
        for bits in (2, 3, 4):
            yield value_case(rng, dim, bits, "lloyd")
    # Two blocks, and the dense rotation where it is asked for and where there is no other.
    yield key_case(rng, 64, 3, n_tokens=67, means=True, balance=True)
    yield key_case(rng, 64, 3, means=True, balance=True, rotation="orthogonal")
    yield key_case(rng, 288, 3, rotation="orthogonal")


def document():
    return {"format_version": 2, "input_unit": UNIT, "cases": list(cases())}


def text(content):
    # One line a field: a change shows as the lines that changed.
    lines = json.dumps({**content, "cases": "@"}).replace('"@"', "[\n")[:-2]
    rows = [",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in case.items()) for case in content["cases"]]
    return lines + "{" + "},\n{".join(rows) + "}\n]}\n"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(text(document()))
