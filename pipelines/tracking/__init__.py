"""MLflow: runs, registry, model card. The only package that imports mlflow."""
