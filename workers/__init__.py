"""The workers: one process per rank that loads weights and runs the model."""
