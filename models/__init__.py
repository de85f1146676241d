"""Known configurations and the writer of tiny checkpoints; README.md has the list."""
