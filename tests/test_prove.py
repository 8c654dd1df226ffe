"""`tqext doctor --prove`: the report's form, and that an answer which is not as our kernels need it is called so."""

import hashlib
import json
import re

import mlx.core as mx
import numpy as np
import pytest

from support import to_numpy
from tqext.commands import doctor, prove

DTYPES = {mx.float32: np.float32, mx.float16: np.float16, mx.uint8: np.uint8, mx.uint16: np.uint16, mx.uint32: np.uint32}


def right_answers(probe):
    """What a GPU that does everything as we need it says, computed by NumPy."""
    x = {k: np.asarray(v) for k, v in probe.inputs.items()}
    with np.errstate(all="ignore"):
        match probe.name:
            case "half subnormals":
                halves = x["bits"].view(np.float16)
                out = {"wide": halves.astype(np.float32), "scaled": halves * np.float16(16384)}
                out["narrow"] = x["numbers"].astype(np.float16).view(np.uint16)
            case "matrix lanes":
                out = {"layout": np.zeros((8, 8), np.float32), "multiplied": x["a"] @ x["b"]}
                for lane in range(32):
                    # Bits of the lane: row 4, column 4, row 2, row 1, column 2.
                    row, column = (lane & 16) // 4 + (lane >> 1 & 3), (lane & 8) // 2 + 2 * (lane & 1)
                    out["layout"][row, column : column + 2] = 2 * lane, 2 * lane + 1
            case "contraction":
                out = {"off": x["a"] * x["b"] + x["c"]}
                out["plain"] = (x["a"].astype(np.float64) * x["b"] + x["c"]).astype(np.float32)
            case "rounding":
                powers = np.exp2(x["exponents"].astype(np.float64)).astype(np.float32)
                out = {"quotient": x["x"] / x["y"], "square_root": np.sqrt(x["x"])}
                out |= {"fast_power": np.nextafter(powers, np.float32(2)), "precise_power": powers}
            case "-inf and NaN":
                v = x["x"]
                out = {"top": np.fmax.reduce(v, 1), "total": v.sum(1), "infinite": v.ravel() == -np.inf}
                out["votes"] = ((v >= 0).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
                out["strange"] = np.isnan(v).ravel()
            case "float subnormals":
                out = {"y": x["x"] * 0}
            case "variable index":
                rows = np.arange(256)
                out = {"picked": x["x"][rows, x["at"]], "kept": x["x"].copy()}
                out["kept"][rows, x["at"]] += 1
    assert out.keys() == probe.outputs.keys()
    for name, (shape, dtype) in probe.outputs.items():
        assert out[name].shape == shape, name
        out[name] = out[name].astype(DTYPES[dtype])
    return out


def as_answered(**changes):
    """The right answers with some outputs changed."""

    def ask(probe):
        out = right_answers(probe)
        return {name: changes[name](x) if name in changes else x for name, x in out.items()}

    return ask


def flipped(x):
    """One number with another last bit."""
    x = x.copy()
    x.reshape(-1).view(f"u{x.dtype.itemsize}")[-1] ^= 1
    return x


def test_the_right_answers_hold():
    answers = prove.probes(right_answers)
    assert len(answers) == len(prove.PROBES) == 7
    assert all(x["held"] for x in answers.values()), answers
    assert answers["float subnormals"]["answer"] == "1024 of 1024 flushed, 0 kept"
    assert re.search(r"fast exp2 1 ulp", answers["rounding"]["answer"])


WRONG = {
    "wide": ("half subnormals", lambda x: np.where(np.abs(x) < 2.0**-14, np.float32(0), x)),
    "scaled": ("half subnormals", lambda x: np.where(np.arange(1024) % 1024 < 512, np.float16(0), x)),
    "narrow": ("half subnormals", flipped),
    "layout": ("matrix lanes", lambda x: x.T),
    "multiplied": ("matrix lanes", flipped),
    "off": ("contraction", lambda x: x + np.float32(1e-8)),
    "quotient": ("rounding", flipped),
    "square_root": ("rounding", flipped),
    "fast_power": ("rounding", lambda x: x * np.float32(1 + 1e-5)),
    "top": ("-inf and NaN", lambda x: np.where(np.isneginf(x), np.float32(0), x)),
    "total": ("-inf and NaN", np.nan_to_num),
    "votes": ("-inf and NaN", flipped),
    "infinite": ("-inf and NaN", np.zeros_like),
    "strange": ("-inf and NaN", np.zeros_like),
    "y": ("float subnormals", lambda x: x + np.float32(1)),
    "picked": ("variable index", np.zeros_like),
    "kept": ("variable index", flipped),
}


@pytest.mark.parametrize("output", WRONG)
def test_a_wrong_answer_is_called_so(output):
    name, change = WRONG[output]
    wrong = [probe for probe, x in prove.probes(as_answered(**{output: change})).items() if not x["held"]]
    assert wrong == [name]


def test_a_probe_that_does_not_compile_is_an_answer():
    def refuse(probe):
        raise RuntimeError("program_source:12: error: unknown type\n```\nmore")

    answers = prove.probes(refuse)
    assert not any(x["held"] for x in answers.values())
    assert "unknown type" in answers["contraction"]["answer"]


def test_contraction_can_be_seen():
    probe = prove._contraction()
    assert (right_answers(probe)["plain"] != 0).sum() > 900


def test_ulps():
    one = np.float32(1)
    assert prove.ulps(np.nextafter(one, np.float32(2)), one) == 1
    assert prove.ulps(np.float32(-0.0), np.float32(0.0)) == 0
    assert prove.ulps(np.float32(-1e-45), np.float32(1e-45)) == 2


def test_parity_counts_bytes_that_differ(monkeypatch):
    honest, calls = prove.tqext.quantize_values, []

    def every_other_is_off(v, **options):
        packed = honest(v, **options)
        calls.append(None)
        return packed._replace(params=packed.params * 1.5) if len(calls) % 2 == 0 else packed

    monkeypatch.setattr(prove.tqext, "quantize_values", every_other_is_off)
    monkeypatch.setattr(prove, "backend", lambda: "metal")
    out = prove.parity(prove.Plan(1, (), (), (), 0, 4))
    for part in out.values():
        assert not part["held"]
        assert part["bytes_unequal"]["value params"]["unequal"] > 0
        assert part["bytes_unequal"]["value codes"]["unequal"] == 0


def test_parity_sees_attention_that_is_off(monkeypatch):
    honest = prove.tqext.turboquant_attention
    monkeypatch.setattr(prove.tqext, "turboquant_attention", lambda *a, **o: honest(*a, **o) * 1.02)
    assert not any(x["held"] for x in prove.parity(prove.Plan(1, (), (), (), 0, 4)).values())


@pytest.mark.parametrize("plan", [prove.QUICK, prove.FULL], ids=["quick", "full"])
def test_cuda_compiles_few_kernels(monkeypatch, plan):
    """What decides a kernel there (cuda/turboquant_attention.cpp), over all problems of a dtype."""
    kernels, data = {}, set()

    def note(q, keys, values, **options):
        rows = min(x for x in (4, 8, 16) if q.shape[1] // keys.shape[1] * q.shape[2] <= x or x == 16)
        kernels.setdefault(q.dtype, set()).add((q.shape[3], keys.bits, values.bits, values.coding, rows))
        data.add(keys.shape)
        return mx.zeros(q.shape)

    monkeypatch.setattr(prove.tqext, "turboquant_attention", note)
    monkeypatch.setattr(prove, "backend", lambda: "cuda")
    assert all(x["problems"] == plan.problems for x in prove.parity(plan).values())
    assert [len(x) for x in kernels.values()] == [prove.CUDA_KERNELS["quick" if plan is prove.QUICK else "full"]] * 3
    assert len(data) > plan.problems / 2  # the data is another each time
    kernels.clear()
    monkeypatch.setattr(prove, "backend", lambda: "metal")
    prove.parity(plan)
    assert all(len(x) > 0.7 * plan.problems for x in kernels.values())


def test_problems_end_when_time_is_up():
    report = _report(parity=prove.parity(prove.Plan(3, (), (), (), 0, 4, parity_seconds=0)))
    assert [x["problems"] for x in report["parity"].values()] == [1, 1, 1]
    assert prove.block(report).count(" 1 of 3 problems, ") == 3


@pytest.mark.parametrize("spent, seconds", [(0, 8), (15, 5), (100, 2)])
def test_speed_takes_the_time_that_is_left(monkeypatch, spent, seconds):
    now, given = [0.0], []
    plan = prove.Plan(1, (), (), (), 8, 4, seconds=20)
    for name in ("facts", "probes", "first_use", "bandwidth"):
        monkeypatch.setattr(prove, name, lambda *_: {})
    monkeypatch.setattr(prove.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(prove, "parity", lambda _: now.__setitem__(0, float(spent)) or {})
    monkeypatch.setattr(prove, "speed", lambda plan: given.append(plan.speed_seconds) or {})
    prove.prove(plan)
    assert given == [seconds]


def test_float64_attention():
    q, k, v = (mx.random.normal((1, h, n, 64), key=mx.random.key(h)) for h, n in ((4, 3), (2, 9), (2, 9)))
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=64**-0.5, mask="causal")
    got = prove._attention(*(prove._float64(x) for x in (q, k, v)), True)
    np.testing.assert_allclose(got, to_numpy(want), atol=1e-5)


def test_the_command_ends_with_a_line_and_a_block(tmp_path, capsys):
    file = tmp_path / "proof.json"
    with pytest.raises(SystemExit) as end:
        doctor.main(["--prove", "--quick", "--json", str(file)])
    report = json.loads(file.read_text())
    out = capsys.readouterr().out
    assert end.value.code == 0, out
    line, fence, *block, last = out.rstrip("\n").split("\n")[out.rstrip("\n").split("\n").index("```text") - 1 :]
    assert (fence, last) == ("```text", "```")
    assert line == block[0] == prove.headline(report)
    assert re.match(r"PROVED (\d+)/\1; attention \d+\.\d\dx as fast as mx.fast float(16|32) at 512 tokens, 4 query heads", line)
    assert block[-1].endswith(hashlib.sha256(file.read_bytes()).hexdigest())
    assert not any("```" in x for x in block)
    assert report["tqext_proof"] == prove.VERSION
    assert all(bool(x["bytes_unequal"]) == (report["facts"]["backend"] != "cpu") for x in report["parity"].values())
    assert set(report["parity"]) == {"float32", "float16", "bfloat16"}
    assert len(report["speed"]["rows"]) + len(report["speed"]["left_out"]) == 3


def _report(**parts):
    parity = {
        "held": True,
        "error": 0.0,
        "tolerance": 1e-5,
        "problems": 1,
        "wanted": 2,
        "bytes_unequal": {"key codes": {"unequal": 0, "bytes": 9}},
    }
    return {
        "quick": True,
        "seconds": {},
        "facts": {"device": {}, "backend": "metal", "system": "", "mlx_wheel": [], "versions": {}},
        "probes": {"contraction": {"held": True, "answer": "x"}},
        "first use": {"extra_ms_of_the_first_call": {"a": 1.0}, "pipelines": []},
        "parity": {"float32": parity},
        "bandwidth": {"copy_gb_per_s": 1.0},
        "speed": {"preset": "tq3", "rows": [], "left_out": []},
    } | parts


@pytest.mark.parametrize("part", ["facts", "probes", "first use", "parity", "bandwidth", "speed"])
def test_a_part_that_fails_is_named(part):
    report = _report(**{part: {"failed": "RuntimeError: no\nroom ```"}})
    assert f"NOT: {part}" in prove.headline(report)
    assert f"{part:<17} FAILED: RuntimeError: no / room '''" in prove.block(report)


def test_pipelines_and_messages_of_many_lines_stay_one_line_each():
    pipeline = {"name": "split", "ms": 12.5, "max_threads": 512, "threads": 256, "simd_width": 32, "threadgroup_bytes": 64}
    report = _report(
        probes={"contraction": {"held": False, "answer": "error: a\nerror: b"}},
        **{"first use": {"extra_ms_of_the_first_call": {"a": 1.0}, "pipelines": [pipeline]}},
    )
    text = prove.block(report)
    assert "\ncontraction       NOT AS ASSUMED: error: a / error: b\n" in text
    assert "\npipeline          split: 12.5 ms, 512 threads at most, 256 launched, 64 static bytes\n" in text
    assert prove.headline(report).startswith("PROVED 5/6, NOT: probes: contraction")
