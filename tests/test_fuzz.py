"""The operators under random calls (fuzz_operators.py), on every instruction set of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import fuzz_operators
import tqext

# TQEXT_FUZZ=100000 tries as many cases, others than the usual ones; they are shared out among the instruction sets.
CASES = int(os.environ.get("TQEXT_FUZZ", 0))
ISAS = tqext.available_isas()
SCRIPT = Path(fuzz_operators.__file__)


def run(isa, n_cases, *options):
    # Each instruction set has cases of its own.
    first = ISAS.index(isa) * n_cases + (1_000_000 if CASES else 0)
    command = [sys.executable, SCRIPT, "--first", str(first), "--cases", str(n_cases), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQEXT_ISA": isa})
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert f"{isa}: {n_cases} cases in" in done.stdout and ", 0 failures" in done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_random_calls_are_right_or_refused(isa):
    run(isa, (CASES or 2000) // len(ISAS))


@pytest.mark.gpu
def test_random_calls_on_the_gpu_are_right_or_refused():
    run(ISAS[-1], CASES or 2000, "--device", "gpu")


@pytest.mark.parametrize("wrong", ["one number", "not a number", "accepts"])
def test_an_operator_that_is_wrong_is_found(wrong, monkeypatch):
    """An error of 1e-3 in one number of the output, a NaN there, or an operator that lets everything pass."""
    attend = tqext.turboquant_attention

    def broken(q, *packed, **options):
        if wrong == "accepts":
            return q
        out = attend(q, *packed, **options)
        if out.size == 0 or out.dtype != mx.float32:
            return out
        flat = out.reshape(-1)
        flat[-1] = np.nan if wrong == "not a number" else flat[-1] + 1e-3 * mx.maximum(mx.abs(out).max(), 1)
        return flat.reshape(out.shape)

    monkeypatch.setattr(tqext, "turboquant_attention", broken)
    kind = fuzz_operators.check_refused if wrong == "accepts" else fuzz_operators.check_attention
    found = 0
    for number in range(120):
        try:
            kind(np.random.default_rng(number))
        except fuzz_operators.Mismatch:
            found += 1
        except (ValueError, TypeError):  # what is given to the operator does not even make a call
            assert wrong == "accepts"
    # A third of the queries are fp32.
    assert found >= (60 if wrong == "accepts" else 15)
