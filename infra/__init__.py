"""The outside systems: object storage, MLflow, the Ray cluster and its jobs. One module each."""
