"""Numbers of many samples, kept in order: trees, ranks, averages. They know nothing of training."""
