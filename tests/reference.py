"""Packed format 2 and its attention in NumPy float64, written from the specification alone.

Nothing here is shared with the package: a mistake would have to be made twice to go unseen. Everything
is as slow and as plain as it can be; shapes are `[..., n_tokens, head_dim]` unless a docstring says more.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

GROUP = 32
BLOCK = 64
ROTATION_SEED = 0x74716578
RESIDUAL_SEED = 0x716A6C00
MAX_HALF = 65504.0
# Gauss-Legendre points and weights on [-1, 1].
NODES = np.polynomial.legendre.leggauss(64)
# Share of a value group's range that the codes span, per number of bits.
VALUE_SHRINK = {2: 0.8, 4: 0.975}


def padded_dim(dim):
    """The dimension that is stored: the next multiple of 32."""
    return (dim + GROUP - 1) // GROUP * GROUP


def pad(x, dim):
    """Zeros appended to the last axis up to `dim`."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, dim - x.shape[-1])])


# ---- rotation ---------------------------------------------------------------------------------


def splitmix64(seed, count):
    """The first `count` outputs of splitmix64 started at `seed`."""
    mask, state, words = (1 << 64) - 1, seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        words.append(z ^ (z >> 31))
    return words


def sign_words(dim, seed=ROTATION_SEED):
    """uint32 words whose bit b of word i is set where dimension 32i + b is negated."""
    return np.array([z >> 32 for z in splitmix64(seed, dim // 32)], np.uint32)


def signs(dim, seed=ROTATION_SEED):
    """The diagonal of +-1."""
    return 1.0 - 2.0 * unpack_bits(sign_words(dim, seed))


def circulant(row):
    return np.array([np.roll(row, i) for i in range(len(row))])


def williamson(a, b, c, d):
    """Four circulants whose squares sum to the order, arranged as a quaternion."""
    a, b, c, d = (circulant([1 if sign == "+" else -1 for sign in row]) for row in (a, b, c, d))
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def paley_12():
    """Paley's second construction over the field of five elements."""
    residue = [0, 1, -1, -1, 1]
    conference = np.ones((6, 6), int)
    conference[0, 0] = 0
    conference[1:, 1:] = circulant(residue)
    return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(6, dtype=int), [[1, -1], [-1, -1]])


def factor(dim):
    """m of dim = m * 2^p with m in {1, 12, 20, 28}, or None."""
    for m in (1, 12, 20, 28):
        if dim % m == 0 and (dim // m) & (dim // m - 1) == 0:
            return m
    return None


@cache
def hadamard(dim):
    """Entries of +-1; the factor outside, Sylvester's matrix inside."""
    matrix = {
        1: lambda: np.ones((1, 1), int),
        12: paley_12,
        20: lambda: williamson("+----", "+----", "++--+", "+-++-"),
        28: lambda: williamson("+------", "++----+", "+-+--+-", "+--++--"),
    }[factor(dim)]()
    while len(matrix) < dim:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return matrix


@cache
def rotation_matrix(dim, seed=ROTATION_SEED):
    """R with rotate(x) = R x. Only where a Hadamard matrix is defined."""
    return hadamard(dim) * signs(dim, seed) / np.sqrt(dim)


@cache
def dense_matrix(dim, seed=ROTATION_SEED):
    """The dense orthogonal matrix: rows of integers, made orthonormal in order, in fp32.

    A QR factorisation whose diagonal is positive is Gram-Schmidt.
    """
    words = np.array([z >> 32 for z in splitmix64(seed ^ dim, 2 * dim * dim)], np.int64).reshape(dim, dim, 2)
    rows = (words & 0xFFFF).sum(-1) + (words >> 16).sum(-1) - 131070
    q, r = np.linalg.qr(rows.T.astype(np.float64))
    return (q * np.sign(np.diag(r))).T.astype(np.float32)


def rotate(x, matrix=None):
    """The last axis rotated; its length is the matrix's."""
    x = np.asarray(x, np.float64)
    return x @ (rotation_matrix(x.shape[-1]) if matrix is None else matrix).T


def unrotate(x, matrix=None):
    x = np.asarray(x, np.float64)
    return x @ (rotation_matrix(x.shape[-1]) if matrix is None else matrix)


# ---- codebook ---------------------------------------------------------------------------------


def _cells(centroids, dim):
    """Quadrature points and weights of the positive half, cell by cell: x and density [n_cells, n_nodes]."""
    nodes, weights = NODES
    # Beyond 12 standard deviations there is nothing left to integrate.
    limit = min(1.0, 12 / np.sqrt(dim))
    edges = np.concatenate([[0.0], (centroids[1:] + centroids[:-1]) / 2, [limit]])
    middle, radius = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    x = middle[:, None] + radius[:, None] * nodes
    return x, radius[:, None] * weights * (1 - x * x) ** ((dim - 3) / 2)


@cache
def lloyd_max(bits, dim):
    """Centroids for one coordinate of a random unit vector: density ~ (1 - x^2)^((dim - 3) / 2)."""

    def step(centroids):
        x, density = _cells(centroids, dim)
        return (x * density).sum(1) / density.sum(1)

    half = 1 << (bits - 1)
    centroids = (np.arange(half) + 0.5) / half * 3 / np.sqrt(dim)
    for _ in range(50):
        centroids = step(centroids)
    # The fixed point by Newton's method: Lloyd's own iteration takes thousands of steps for 16 levels.
    for _ in range(6):
        nudge = 1e-7
        slope = np.stack([step(centroids + nudge * unit) for unit in np.eye(half)], 1)
        slope = (slope - step(centroids)[:, None]) / nudge - np.eye(half)
        centroids = centroids - np.linalg.solve(slope, step(centroids) - centroids)
    assert np.abs(step(centroids) - centroids).max() < 1e-12
    return np.concatenate([-centroids[::-1], centroids])


def distortion(centroids, dim):
    """dim * E[(x - c(x))^2] for nearest-centroid coding: what a unit vector loses."""
    positive = centroids[len(centroids) // 2 :]
    x, density = _cells(positive, dim)
    return dim * (density * (x - positive[:, None]) ** 2).sum() / density.sum()


@cache
def codebook(bits, dim):
    """(levels, scale): int8 levels with the outermost at +-127 = scale."""
    centroids = lloyd_max(bits, dim)
    return np.rint(centroids / centroids[-1] * 127).astype(np.int8), centroids[-1]


# ---- packing ----------------------------------------------------------------------------------


def unpack_bits(words):
    """uint32[..., w] -> 0/1 [..., 32w], bit b of word i at 32i + b."""
    words = np.asarray(words, np.uint32)
    return ((words[..., None] >> np.arange(32, dtype=np.uint32)) & 1).reshape(*words.shape[:-1], 32 * words.shape[-1])


@cache
def _key_positions(bits, dim):
    """For every dimension, the (word, bit) of each bit of its code, low bit first."""
    positions = []
    for d in range(dim):
        unit, inside = divmod(d, 32)
        group, nibble = divmod(inside, 8)
        first = unit * bits
        if bits == 3 and group == 3:
            positions.append([(first + i, 4 * nibble + 3) for i in range(3)])
        elif bits == 2:
            positions.append([(first + group % 2, 4 * nibble + group // 2 * 2 + i) for i in range(2)])
        else:
            positions.append([(first + group, 4 * nibble + i) for i in range(bits)])
    return positions


@cache
def _value_positions(bits, dim):
    n_words = dim * bits // 32
    return [[(d % n_words, d // n_words * bits + i) for i in range(bits)] for d in range(dim)]


def _pack(codes, bits, positions):
    places = np.array(positions)  # [dim, bits, (word, bit)]
    plane = np.zeros((*codes.shape[:-1], codes.shape[-1] * bits), np.uint8)
    plane[..., places[..., 0] * 32 + places[..., 1]] = (codes[..., None].astype(np.int64) >> np.arange(bits)) & 1
    return np.packbits(plane, axis=-1, bitorder="little").view("<u4").astype(np.uint32)


def _unpack(words, bits, positions):
    places = np.array(positions)
    plane = np.unpackbits(np.array(words, "<u4").view(np.uint8), axis=-1, bitorder="little")
    return (plane[..., places[..., 0] * 32 + places[..., 1]].astype(np.int64) << np.arange(bits)).sum(-1)


def pack_keys(codes, bits):
    return _pack(codes, bits, _key_positions(bits, codes.shape[-1]))


def unpack_keys(words, bits):
    return _unpack(words, bits, _key_positions(bits, words.shape[-1] * 32 // bits))


def pack_values(codes, bits):
    return _pack(codes, bits, _value_positions(bits, codes.shape[-1]))


def unpack_values(words, bits):
    return _unpack(words, bits, _value_positions(bits, words.shape[-1] * 32 // bits))


def pack_signs(bits):
    return _pack(bits, 1, [[divmod(d, 32)] for d in range(bits.shape[-1])])


# ---- encoding ---------------------------------------------------------------------------------


@dataclass
class Keys:
    codes: np.ndarray  # uint32[..., dim * bits / 32]
    norms: np.ndarray  # float16[..., 1]
    bits: int
    head_dim: int
    means: np.ndarray | None = None  # float16[..., n_blocks, head_dim]
    balance: np.ndarray | None = None  # float32[..., head_dim]
    signs: np.ndarray | None = None  # uint32[..., dim / 32]
    residual_norms: np.ndarray | None = None  # float16[..., 1]
    # Per token, how far the nearest decision is from going the other way, relative to the token's size.
    margin: np.ndarray | None = None


@dataclass
class Values:
    codes: np.ndarray  # uint32[..., dim * bits / 32]
    params: np.ndarray  # float16: [..., 2 * dim / 32] scale, bias, scale, bias...; "lloyd": [..., 1] the norm
    bits: int
    head_dim: int
    coding: str = "groups"
    margin: np.ndarray | None = None


def to_half(x):
    """Nearest-even fp16, clipped to the largest finite one."""
    return np.clip(x, -MAX_HALF, MAX_HALF).astype(np.float16)


def half_margin(x, size):
    """Distance of x from the nearest point where its fp16 rounding changes, relative to `size`."""
    near = x.astype(np.float16)
    up = (near.astype(np.float64) + np.nextafter(near, np.float16(np.inf)).astype(np.float64)) / 2
    down = (near.astype(np.float64) + np.nextafter(near, np.float16(-np.inf)).astype(np.float64)) / 2
    return np.minimum(up - x, x - down) / np.where(size > 0, size, 1)


def spread(means, n_tokens):
    """Each token's mean, from the means of blocks: [..., n_blocks, D] -> [..., n_tokens, D]."""
    return np.repeat(np.asarray(means, np.float64), BLOCK, -2)[..., :n_tokens, :]


def block_means(k):
    """fp16 means of blocks of 64 tokens, over the tokens that are finite; zero where none is."""
    k = np.asarray(k, np.float64)
    means = np.zeros((*k.shape[:-2], -(-k.shape[-2] // BLOCK), k.shape[-1]))
    for i in range(means.shape[-2]):
        block = k[..., i * BLOCK : (i + 1) * BLOCK, :]
        finite = np.isfinite(block).all(-1, keepdims=True)
        total = np.where(finite, block, 0.0).sum(-2)
        means[..., i, :] = total / np.maximum(finite.sum(-2), 1)
    return to_half(means)


def encode_levels(x, bits):
    """(codes, decoded levels / 127, the least distance of a coordinate of x / |x| from a decision) of rotated vectors."""
    dim = x.shape[-1]
    length = np.sqrt((x * x).sum(-1, keepdims=True))
    unit = x / np.where(length > 0, length, 1)
    levels, scale = codebook(bits, dim)
    levels = levels.astype(np.float64)
    boundaries = (levels[1:] + levels[:-1]) / 2 * (scale / 127)
    codes = (unit[..., None] >= boundaries).sum(-1)
    return codes, levels[codes] / 127, np.abs(unit[..., None] - boundaries).min((-1, -2))


def encode_keys(k, bits=3, means=None, balance=None, qjl=False, matrix=None):
    """(k - mean) * balance, rotated; the nearest level of every coordinate and the length that keeps <k, k_hat> = |k|^2."""
    head_dim = k.shape[-1]
    dim = padded_dim(head_dim)
    centred = np.asarray(k, np.float64)
    if means is not None:
        centred = centred - spread(means, k.shape[-2])
    if balance is not None:
        centred = centred * np.asarray(balance, np.float64)[..., None, :]
    x = rotate(pad(centred, dim), matrix)
    codes, decoded, decision = encode_levels(x, bits)
    square, dot = (x * x).sum(-1, keepdims=True), (x * decoded).sum(-1, keepdims=True)
    norm = np.where(square > 0, square / np.where(dot != 0, dot, 1), 0.0)
    margin = np.minimum(decision, half_margin(norm, norm)[..., 0])
    keys = Keys(pack_keys(codes, bits), to_half(norm), bits, head_dim, means=means, balance=balance, margin=margin)
    if qjl:
        residual = x - keys.norms.astype(np.float64) * decoded
        z = rotate(residual, rotation_matrix(dim, RESIDUAL_SEED))
        residual_norm = np.sqrt((residual**2).sum(-1, keepdims=True))
        keys.signs = pack_signs((z >= 0).astype(np.int64))
        keys.residual_norms = to_half(residual_norm)
        safe = np.where(residual_norm > 0, residual_norm, 1)
        keys.margin = np.minimum(
            margin, np.minimum((np.abs(z) / safe).min(-1), half_margin(residual_norm, residual_norm)[..., 0])
        )
    return keys


def encode_values_lloyd(v, bits=3, matrix=None):
    """Rotate; the nearest level c of every coordinate, as for keys, and the norm of least squared error, <v, c> / <c, c>."""
    head_dim = v.shape[-1]
    x = rotate(pad(np.asarray(v, np.float64), padded_dim(head_dim)), matrix)
    codes, decoded, decision = encode_levels(x, bits)
    norm = (x * decoded).sum(-1, keepdims=True) / (decoded * decoded).sum(-1, keepdims=True)
    norm = np.where((x * x).sum(-1, keepdims=True) > 0, norm, 0.0)
    margin = np.minimum(decision, half_margin(norm, norm)[..., 0])
    return Values(pack_keys(codes, bits), to_half(norm), bits, head_dim, "lloyd", margin)


def encode_values(v, bits=2, matrix=None):
    """Rotate; per group of 32, codes over the middle of the range, then scale and bias by least squares."""
    head_dim = v.shape[-1]
    dim = padded_dim(head_dim)
    x = rotate(pad(np.asarray(v, np.float64), dim), matrix)
    groups = x.reshape(*x.shape[:-1], dim // GROUP, GROUP)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    width = VALUE_SHRINK[bits] * (high - low)
    step = width / (2**bits - 1)
    start = (low + high) / 2 - width / 2
    place = (groups - start) / np.where(step > 0, step, 1)
    codes = np.clip(np.rint(place), 0, 2**bits - 1)

    code_mean, value_mean = codes.mean(-1, keepdims=True), groups.mean(-1, keepdims=True)
    variance = ((codes - code_mean) ** 2).sum(-1, keepdims=True)
    covariance = ((codes - code_mean) * (groups - value_mean)).sum(-1, keepdims=True)
    fit = np.where(variance > 0, covariance / np.where(variance > 0, variance, 1), 0.0)
    bias = value_mean - fit * code_mean
    params = np.concatenate([fit, bias], -1)
    inner = np.abs(place - np.floor(place) - 0.5)
    # A value beyond the ends is clamped whichever way it rounds.
    inner = np.where((place < 0) | (place > 2**bits - 1), 0.5, inner)
    near = np.minimum(half_margin(fit, fit), half_margin(bias, high - low)).min((-1, -2))
    margin = np.minimum(inner.min((-1, -2)), near)
    return Values(
        pack_values(codes.reshape(x.shape).astype(np.int64), bits),
        to_half(params.reshape(*x.shape[:-1], -1)),
        bits,
        head_dim,
        "groups",
        margin,
    )


# ---- decoding and attention -------------------------------------------------------------------


def decode_keys(keys, *, rotated=False, matrix=None, residual=False):
    """The stored vectors: in the rotated space, balanced and without the means; or in the original space with both undone.

    `residual=True` adds the vector whose products with a query are the residual's part of the score.
    """
    dim = padded_dim(keys.head_dim)
    levels = codebook(keys.bits, dim)[0].astype(np.float64) / 127
    x = np.asarray(keys.norms).astype(np.float64) * levels[unpack_keys(keys.codes, keys.bits)]
    if residual and keys.signs is not None:
        direction = 2.0 * unpack_bits(keys.signs) - 1.0
        length = np.asarray(keys.residual_norms).astype(np.float64) * np.sqrt(np.pi / 2) / np.sqrt(dim)
        x = x + length * unrotate(direction, rotation_matrix(dim, RESIDUAL_SEED))
    if rotated:
        return x
    x = unrotate(x, matrix)[..., : keys.head_dim]
    if keys.balance is not None:
        x = x / np.asarray(keys.balance, np.float64)[..., None, :]
    return x if keys.means is None else x + spread(keys.means, x.shape[-2])


def decode_values(values, *, rotated=False, matrix=None):
    if values.coding == "lloyd":
        levels = codebook(values.bits, padded_dim(values.head_dim))[0].astype(np.float64) / 127
        x = np.asarray(values.params).astype(np.float64) * levels[unpack_keys(values.codes, values.bits)]
        return x if rotated else unrotate(x, matrix)[..., : values.head_dim]
    codes = unpack_values(values.codes, values.bits).astype(np.float64)
    params = np.asarray(values.params).astype(np.float64)
    scales, biases = (np.repeat(params[..., i::2], GROUP, -1) for i in (0, 1))
    x = codes * scales + biases
    return x if rotated else unrotate(x, matrix)[..., : values.head_dim]


def allowed_columns(n_rows, n_first, n_coded, n_tail, causal=False, left_padding=0, lengths=None):
    """bool [n_rows, n_first + n_coded + n_tail] for one sequence."""
    n_columns = n_first + n_coded + n_tail
    column, row = np.arange(n_columns), np.arange(n_rows)[:, None]
    allowed = np.broadcast_to(column >= left_padding, (n_rows, n_columns)).copy()
    if causal:
        allowed &= column <= n_columns - n_rows + row
    if lengths is not None:
        part = np.concatenate([np.arange(n) for n in (n_first, n_coded, n_tail)]).astype(int)
        valid = part < np.repeat(np.asarray(lengths), (n_first, n_coded, n_tail))
        # Under "causal" the last columns are the rows' own tokens: always there, ordered by the triangle.
        if causal:
            valid |= column >= n_columns - n_rows
        allowed &= valid
    return allowed


def listed_columns(allowed, ids, n_first, n_coded):
    """Numbers of the allowed columns, of the coded ones those that `ids` names, as often as it does."""
    coded = [n_first + int(i) for i in ids if 0 <= i < n_coded and allowed[n_first + int(i)]]
    exact = allowed.copy()
    exact[n_first : n_first + n_coded] = False
    return np.concatenate([np.flatnonzero(exact), np.array(coded, int)])


def attention(
    q, k, v, *, scale=None, mask=None, tail=None, sinks=None, first=None, left_padding=None, lengths=None, indices=None
):
    """Softmax attention of q [B, Hq, L, D] over first ++ k ++ tail; columns that are not allowed are not read.

    `k` and `v` are the decoded tokens [B, Hkv, N, D]; a row that attends to nothing is zero. `indices`: ids of the rows of k
    that count, [B, Hkv or 1, L or 1, n]; others name no token.
    """
    q = np.asarray(q, np.float64)
    parts = [part for part in (first, (k, v), tail) if part is not None]
    n_first = first[0].shape[2] if first is not None else 0
    n_tail = tail[0].shape[2] if tail is not None else 0
    keys, values = (np.concatenate([np.asarray(p[i], np.float64) for p in parts], 2) for i in (0, 1))
    n_batch, n_heads, n_rows, dim = q.shape
    n_repeats = n_heads // keys.shape[1]
    scale = dim**-0.5 if scale is None else scale
    causal = isinstance(mask, str)
    if mask is not None and not causal:
        mask = np.broadcast_to(mask, (n_batch, n_heads, n_rows, keys.shape[2]))
    if indices is not None:
        lists = np.broadcast_to(np.asarray(indices).astype(np.int64), (n_batch, keys.shape[1], n_rows, indices.shape[3]))
    out = np.zeros((n_batch, n_heads, n_rows, values.shape[-1]))
    for b in range(n_batch):
        allowed = allowed_columns(
            n_rows,
            n_first,
            k.shape[2],
            n_tail,
            causal,
            0 if left_padding is None else left_padding[b],
            None if lengths is None else lengths[b],
        )
        for h in range(n_heads):
            for i in range(n_rows):
                columns = allowed[i]
                row = np.zeros(keys.shape[2])
                if mask is not None and not causal:
                    row = mask[b, h, i]
                    row = np.where(row, 0.0, -np.inf) if row.dtype == bool else row.astype(np.float64)
                    columns = columns & (row != -np.inf)
                if indices is not None:
                    columns = listed_columns(columns, lists[b, h // n_repeats, i], n_first, k.shape[2])
                bias = row[columns]
                score = scale * (keys[b, h // n_repeats][columns] @ q[b, h, i]) + bias
                sink = -np.inf if sinks is None else float(sinks[h])
                top = max(score.max(initial=-np.inf), sink) if not np.isnan(score).any() else np.nan
                if top == -np.inf:
                    continue
                weight = np.exp(score - top)
                total = weight.sum() + np.exp(sink - top)
                out[b, h, i] = weight @ values[b, h // n_repeats][columns] / total
    return out


# ---- weights of one and two bits ---------------------------------------------------------------


def q1_weights(words, scales):
    """Words uint32 [..., cols / 32] and scales [..., cols / 128] as weights; bit j of a word is the sign of column j."""
    return (2.0 * unpack_bits(words) - 1.0) * np.repeat(scales.astype(np.float64), 128, axis=-1)


def ternary_weights(words, scales):
    """Words uint32 [rows, cols / 16] and scales [rows, cols / 128] as weights; code j of a word is at bit 2j."""
    codes = words[..., None] >> np.arange(0, 32, 2, dtype=np.uint32) & 3
    values = codes.reshape(len(words), 16 * words.shape[1]).astype(np.float64) - 1
    return values * np.repeat(scales.astype(np.float64), 128, axis=-1)
