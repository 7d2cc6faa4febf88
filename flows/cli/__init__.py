"""The command line ``kd``: what a person types and sees. Order is the business of ``flows`` itself, work of ``kd_core``."""

from flows.cli.app import app, main

__all__ = ["app", "main"]
