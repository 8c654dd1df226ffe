"""GGUF files, under the name by which other programs import their converter; see `tqext.one_bit.gguf`."""

from tqext.one_bit.gguf import convert, folder_of, read, unpack_blocks

__all__ = ["convert", "folder_of", "read", "unpack_blocks"]
