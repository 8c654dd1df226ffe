"""Writes data/golden_v1.json: packed bytes of format 1, made by reference.py alone.

Inputs are integers over 32, exact in fp32, fp16 and bf16. Every decision that decides a byte (a code, a sign, the rounding
of a parameter) is further from going the other way than fp32 arithmetic can err, so every backend must give the same bytes.

    python tests/make_golden.py
"""

import json
import pathlib

import numpy as np

import reference

PATH = pathlib.Path(__file__).parent / "data" / "golden_v1.json"
UNIT = 2.0**-5
N_TOKENS = 3
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


def tokens_with_margin(rng, dim, encode):
    """N_TOKENS integer vectors whose encoding leaves the margin everywhere."""
    rows = []
    while len(rows) < N_TOKENS:
        row = draw(rng, dim)
        if encode(row[None] * UNIT).margin.min() > MARGIN:
            rows.append(row)
    return np.array(rows)


def cases():
    rng = np.random.default_rng(20260101)
    for dim in (32, 64, 80, 96, 112, 128, 160, 224, 256, 512):
        for bits in (2, 3, 4):
            variants = [(False, False)]
            if dim in (80, 128):
                variants += [(True, False), (True, True)]
            for with_mean, qjl in variants:
                mean = draw(rng, dim) if with_mean else None

                def encode(k, bits=bits, mean=mean, qjl=qjl):
                    return reference.encode_keys(k, bits, None if mean is None else mean * UNIT, qjl)

                rows = tokens_with_margin(rng, dim, encode)
                keys = encode(rows * UNIT)
                yield {
                    "kind": "keys",
                    "head_dim": dim,
                    "bits": bits,
                    "input": rows.tolist(),
                    "mean": None if mean is None else mean.tolist(),
                    "codes": hexadecimal(keys.codes),
                    "norms": hexadecimal(keys.norms),
                    "signs": hexadecimal(keys.signs) if qjl else None,
                    "residual_norms": hexadecimal(keys.residual_norms) if qjl else None,
                }
        for bits in (2, 4):

            def encode(v, bits=bits):
                return reference.encode_values(v, bits)

            rows = tokens_with_margin(rng, dim, encode)
            values = encode(rows * UNIT)
            yield {
                "kind": "values",
                "head_dim": dim,
                "bits": bits,
                "input": rows.tolist(),
                "codes": hexadecimal(values.codes),
                "params": hexadecimal(values.params),
            }


def document():
    return {"format_version": 1, "input_unit": UNIT, "cases": list(cases())}


def text(content):
    # One line a field: a change shows as the lines that changed.
    lines = json.dumps({**content, "cases": "@"}).replace('"@"', "[\n")[:-2]
    rows = [",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in case.items()) for case in content["cases"]]
    return lines + "{" + "},\n{".join(rows) + "}\n]}\n"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(text(document()))
