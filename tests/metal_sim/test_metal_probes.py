"""The probes of `tqext doctor --prove` on the simulated GPU: their kernels are right Metal and ask what they mean to ask."""

import metal_simulator as sim
import mlx.core as mx
import numpy as np
import pytest

from tqext.commands import prove

TYPES = {
    mx.float32: ("float", np.float32),
    mx.float16: ("half", np.float16),
    mx.uint8: ("uint8_t", np.uint8),
    mx.uint16: ("uint16_t", np.uint16),
    mx.uint32: ("uint32_t", np.uint32),
}
ATTRIBUTES = {"thread_position_in_grid": "uint3", "thread_index_in_simdgroup": "uint"}


def kernel_text(probe):
    """The kernel that mx.fast.metal_kernel makes of a probe."""
    arguments = [f"const device {TYPES[mx.array(x).dtype][0]}* {name}" for name, x in probe.inputs.items()]
    arguments += [f"device {TYPES[dtype][0]}* {name}" for name, (_, dtype) in probe.outputs.items()]
    arguments = [f"{text} [[buffer({i})]]" for i, text in enumerate(arguments)]
    arguments += [f"{kind} {name} [[{name}]]" for name, kind in ATTRIBUTES.items() if name in probe.source]
    header = "#include <metal_stdlib>\n#include <metal_simdgroup>\nusing namespace metal;\n" + probe.header
    return f"{header}\nkernel void probe({', '.join(arguments)}) {{{probe.source}}}\n"


@pytest.mark.parametrize("make", prove.PROBES, ids=lambda make: make.__name__.strip("_"))
def test_probe_holds_on_the_simulator(make):
    probe = make()
    outputs = {name: sim.Output(shape, TYPES[dtype][1]) for name, (shape, dtype) in probe.outputs.items()}
    inputs = [np.ascontiguousarray(x) for x in probe.inputs.values()]
    library = sim.build(kernel_text(probe), mode="check")
    library.run("probe", dict(enumerate([*inputs, *outputs.values()])), (probe.threads // 32,), (32,))
    held, text = probe.judge({name: x.array.reshape(probe.outputs[name][0]) for name, x in outputs.items()})
    assert held, text


@pytest.mark.parametrize("make", prove.PROBES, ids=lambda make: make.__name__.strip("_"))
def test_probe_passes_the_syntax_check(make):
    assert sim.strict_errors(kernel_text(make())) == []
