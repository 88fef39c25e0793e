"""The autotuner: records what a step calls, proves candidates right, measures them, and chooses a plan."""
