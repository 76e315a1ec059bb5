"""The orchestration: studies planned, run on Ray, projected into MLflow. The only room that knows Ray and MLflow."""
