"""What is measured beside the training loss, and what follows from it."""
