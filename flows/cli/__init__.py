"""The command line ``kd``: what a person types and sees. Order is the business of ``flows`` itself, work of ``kd_core``."""

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script. All else is imported in here, so that an interrupt is one line from the beginning on."""
    try:
        from flows.cli.entry import run

        run()
    except KeyboardInterrupt:
        print("kd: stopped before anything was begun", file=sys.stderr)
        sys.exit(130)
