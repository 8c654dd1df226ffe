"""On PYTHONPATH: MLX's default device is the CPU in this process and in those that it starts, also where there is a GPU."""

import contextlib

with contextlib.suppress(ImportError):  # pip and the like run without MLX
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
