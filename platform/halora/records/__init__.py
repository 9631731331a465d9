"""Everything written to and read from MLflow."""
