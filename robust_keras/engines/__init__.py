"""Where a run computes: strategies, functions over replicas, exact executions of training steps."""
