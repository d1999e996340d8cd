"""Training, evaluation and run folders."""
