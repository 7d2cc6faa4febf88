"""Which deployments `kd up` registers: those of the user's prefect.yaml, or the ones that come with the package."""

from pathlib import Path

__all__ = ["deployments_file"]


def deployments_file() -> Path:
    """./prefect.yaml if there is one, else ours beside this module."""
    own = Path("prefect.yaml")
    return own if own.is_file() else Path(__file__).with_name("prefect.yaml")
