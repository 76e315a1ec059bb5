"""The orchestration: studies planned, run on Ray, projected into MLflow. The only room that knows Ray and MLflow."""

import os

# Ray reads it when it is imported: a thread that outlives its session would start a cluster of its own by its next call.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
