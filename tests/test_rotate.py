"""rotate: signs and Walsh-Hadamard where a matrix exists, a dense orthogonal matrix elsewhere."""

import mlx.core as mx
import numpy as np
import pytest

import reference
import tqext
from support import DTYPES, ROUNDING_TOLERANCE, assert_close, error_line, to_numpy

pytestmark = pytest.mark.usefixtures("device")

HADAMARD_DIMS = [32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]
DENSE_DIMS = [288, 352, 416, 480]


def normal(rng, *shape):
    return mx.array(rng.normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("dim", [dim for dim in range(32, 513, 32) if reference.factor(dim)])
def test_reference_hadamard_is_mlx_hadamard(dim):
    signed = reference.hadamard(dim)
    assert np.array_equal(signed @ signed.T, dim * np.eye(dim, dtype=int))
    ours = to_numpy(mx.hadamard_transform(mx.eye(dim), scale=1.0)).T
    assert np.array_equal(ours, signed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HADAMARD_DIMS)
def test_rotate_matches_reference(dim, dtype, rng):
    x = normal(rng, 5, 3, dim).astype(DTYPES[dtype])
    assert_close(tqext.rotate(x), reference.rotate(to_numpy(x)), ROUNDING_TOLERANCE[DTYPES[dtype]])
    assert_close(tqext.rotate(x, inverse=True), reference.unrotate(to_numpy(x)), ROUNDING_TOLERANCE[DTYPES[dtype]])


@pytest.mark.parametrize("dim", HADAMARD_DIMS)
def test_rotate_is_mlx_hadamard_of_the_signed_vector(dim, rng):
    x = normal(rng, 7, dim)
    signed = x * mx.array(reference.signs(dim).astype(np.float32))
    assert_close(tqext.rotate(x), to_numpy(mx.hadamard_transform(signed)), 1e-6)


@pytest.mark.covering
@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("dim", [*HADAMARD_DIMS, *DENSE_DIMS])
def test_rotate_is_orthogonal(dim, rotation):
    columns = to_numpy(tqext.rotate(mx.eye(dim), rotation=rotation)).astype(np.float64)
    assert np.abs(columns @ columns.T - np.eye(dim)).max() < 1e-5
    # Every output mixes all inputs: a permutation or a block would pass as orthogonal.
    assert (np.abs(columns).max(0) < 8 / np.sqrt(dim)).all()
    assert (np.abs(columns) > 1e-3 / np.sqrt(dim)).mean() > 0.99


@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal", "none"])
@pytest.mark.parametrize("dim", [32, 96, 288, 512])
def test_rotate_inverse_gives_the_vector_back(dim, rotation, rng):
    x = normal(rng, 2, 9, dim)
    back = tqext.rotate(tqext.rotate(x, rotation=rotation), inverse=True, rotation=rotation)
    assert_close(back, to_numpy(x), 1e-5)


def test_rotate_none_changes_nothing(rng):
    x = normal(rng, 3, 64)
    assert np.array_equal(to_numpy(tqext.rotate(x, rotation="none")), to_numpy(x))


@pytest.mark.parametrize("dim", DENSE_DIMS)
def test_rotate_without_a_hadamard_matrix_is_the_dense_matrix(dim, rng):
    x = normal(rng, 3, dim)
    assert np.array_equal(to_numpy(tqext.rotate(x)), to_numpy(tqext.rotate(x, rotation="orthogonal")))


@pytest.mark.parametrize("shape", [(128,), (0, 128), (2, 0, 64), (3, 1, 2, 5, 32)])
def test_rotate_takes_any_leading_axes(shape, rng):
    x = normal(rng, *shape)
    got = tqext.rotate(x)
    assert got.shape == shape
    assert_close(got, reference.rotate(to_numpy(x)), 2e-6)


def test_rotate_reads_strided_inputs(rng):
    buffer = mx.full((4, 6, 10, 96), float("nan"))
    x = normal(rng, 2, 5, 3, 64)
    buffer[1:3, :5, 4:10:2, 16:80] = x
    mx.eval(buffer)
    view = buffer[1:3, :5, 4:10:2, 16:80]
    assert_close(tqext.rotate(view), reference.rotate(to_numpy(x)), 2e-6)
    swapped = mx.swapaxes(x, 0, 2)
    assert_close(tqext.rotate(swapped), reference.rotate(to_numpy(swapped)), 2e-6)
    last = mx.swapaxes(normal(rng, 64, 3), 0, 1)
    assert_close(tqext.rotate(last), reference.rotate(to_numpy(last)), 2e-6)


def test_rotate_of_nan_is_nan(rng):
    x = normal(rng, 2, 64)
    x[0, 5] = float("nan")
    got = to_numpy(tqext.rotate(x))
    assert np.isnan(got[0]).all()
    assert_close(got[1], reference.rotate(to_numpy(x)[1]), 2e-6)


@pytest.mark.parametrize("shapeless", [False, True])
def test_rotate_under_compile(shapeless, rng):
    rotate = mx.compile(lambda x: tqext.rotate(x * 2), shapeless=shapeless)
    for n in (3, 5):
        x = normal(rng, n, 64)
        assert_close(rotate(x), reference.rotate(2 * to_numpy(x)), 2e-6)


@pytest.mark.parametrize(
    "argument, call",
    [
        ("x", lambda: tqext.rotate(mx.zeros((2, 33)))),
        ("x", lambda: tqext.rotate(mx.zeros((2, 544)))),
        ("x", lambda: tqext.rotate(mx.zeros((2, 0)))),
        ("x", lambda: tqext.rotate(mx.array(1.0))),
        ("x", lambda: tqext.rotate(mx.zeros((2, 64), mx.int32))),
        ("x", lambda: tqext.rotate(mx.zeros((2, 64), mx.complex64))),
        ("rotation", lambda: tqext.rotate(mx.zeros((2, 64)), rotation="fourier")),
    ],
)
def test_rotate_rejects(argument, call):
    with pytest.raises(ValueError, match=error_line("rotate", argument)):
        call()
