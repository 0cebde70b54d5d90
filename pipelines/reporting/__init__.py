"""What people see: the page, the tables, MLflow."""
