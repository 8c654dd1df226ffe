"""Models with 1-bit weights: their layers (`nn`), checkpoints (`checkpoint`), and GGUF files as mlx-lm folders (`gguf`)."""

from tqext.one_bit.checkpoint import (
    CONFIG_KEY,
    check_native,
    check_tensors,
    hook,
    one_bit_paths,
    refuse_hadamard,
    save,
    unhook,
    write_config,
)

__all__ = [
    "CONFIG_KEY",
    "check_native",
    "check_tensors",
    "hook",
    "one_bit_paths",
    "refuse_hadamard",
    "save",
    "unhook",
    "write_config",
]
