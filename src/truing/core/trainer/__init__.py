"""Training on rows: start, tasks, teachers, mixes, checkpoints, several processes."""
