"""mlx-lm on compressed caches: hooks on attention, on loading and on cache making, and the proof that they are in effect."""

from typing import TYPE_CHECKING, Any

from tqext._lazy import attribute

# On first use, as in `tqext` itself: the hooks are also for packages that this one is built on.
_LAZY = {
    "Layer": "tqext.mlx_lm.reports",
    "MAX_HEAD_DIM": "tqext.mlx_lm.probing",
    "PathError": "tqext.mlx_lm.proof",
    "Report": "tqext.mlx_lm.reports",
    "UPGRADE_CHUNK": "tqext.mlx_lm.upgrading",
    "VERIFY_CODED": "tqext.mlx_lm.proof",
    "attach": "tqext.mlx_lm.attaching",
    "calibrate": "tqext.mlx_lm.guard",
    "detach": "tqext.mlx_lm.attaching",
    "hook": "tqext.mlx_lm.hooks",
    "install": "tqext.mlx_lm.attaching",
    "make_prompt_cache": "tqext.mlx_lm.attaching",
    "on_cache": "tqext.mlx_lm.attaching",
    "probe": "tqext.mlx_lm.probing",
    "report": "tqext.mlx_lm.attaching",
    "stock_cache": "tqext.mlx_lm.caches",
    "uninstall": "tqext.mlx_lm.attaching",
    "upgrade": "tqext.mlx_lm.upgrading",
    "verify": "tqext.mlx_lm.proof",
}

if TYPE_CHECKING:
    from tqext.mlx_lm.attaching import attach, detach, install, make_prompt_cache, on_cache, report, uninstall
    from tqext.mlx_lm.caches import stock_cache
    from tqext.mlx_lm.guard import calibrate
    from tqext.mlx_lm.hooks import hook
    from tqext.mlx_lm.probing import MAX_HEAD_DIM, probe
    from tqext.mlx_lm.proof import VERIFY_CODED, PathError, verify
    from tqext.mlx_lm.reports import Layer, Report
    from tqext.mlx_lm.upgrading import UPGRADE_CHUNK, upgrade

__all__ = [
    "MAX_HEAD_DIM",
    "UPGRADE_CHUNK",
    "VERIFY_CODED",
    "Layer",
    "PathError",
    "Report",
    "attach",
    "calibrate",
    "detach",
    "hook",
    "install",
    "make_prompt_cache",
    "on_cache",
    "probe",
    "report",
    "stock_cache",
    "uninstall",
    "upgrade",
    "verify",
]


def __getattr__(name: str) -> Any:
    return attribute(__name__, _LAZY, name)


def __dir__() -> list[str]:
    return __all__
