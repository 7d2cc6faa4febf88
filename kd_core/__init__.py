"""The distillation library: recipes, artifacts, stages. Never imports prefect or mlflow."""
