"""The distillation library: recipes, artifacts, stages. Never imports prefect or mlflow."""

__all__ = ["__version__"]

__version__ = "0.1.0"
