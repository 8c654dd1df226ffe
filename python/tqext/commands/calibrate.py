"""``tqext calibrate``: the error of each layer under a preset."""

from __future__ import annotations

from collections.abc import Sequence

from tqext.commands.options import MODEL_HELP, ArgumentParser, add_kv_options, policy_of
from tqext.mlx_lm import attach, calibrate, report
from tqext.models import load


def main(argv: Sequence[str] | None = None) -> None:
    """``tqext calibrate``: what compression does to each layer's attention, and what the guard makes of it."""
    parser = ArgumentParser(prog="tqext calibrate", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_kv_options(parser)
    options = parser.parse_args(argv)
    policy = policy_of(options)
    if policy is None:
        parser.error("--kv none: expected a preset to calibrate for")
    model, _ = load(options.model)
    print(calibrate(model, policy).table())
    print(report(attach(model, policy)))
