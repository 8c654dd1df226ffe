"""Compile-time parameters of a variant of each CUDA attention kernel, which test_cuda_compile.py and .ci/tidy_commands vary."""

ATTENTION = {
    "KEY_DIM": 128,
    "VALUE_DIM": 128,
    "KEY_BITS": 3,
    "VALUE_BITS": 2,
    "LLOYD": 0,
    "ROWS": 4,
    "TYPE": 1,
    "MASK": 0,
    "SIGNS": 0,
    "STRIDED": 0,
    "LISTED": 0,
    "STAGES": 4,
    "BLOCKS_PER_SM": 3,
}

PROMPT = {
    "KEY_DIM": 128,
    "VALUE_DIM": 128,
    "KEY_BITS": 3,
    "VALUE_BITS": 2,
    "LLOYD": 0,
    "ROWS": 128,
    "TYPE": 1,
    "MASK": 0,
    "SLOTS": 4,
    "BLOCKS_PER_SM": 1,
    "WGMMA": 0,
    "TILES": 0,
}
