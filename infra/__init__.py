"""The outside systems: object storage, MLflow, the Ray cluster and its jobs. One module each."""

import os

# Before any module here imports MLflow: a training on a closed network reports to nobody.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
