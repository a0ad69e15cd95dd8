"""What is known of each sample: the catalog of losses, quartiles, and estimates from one loss a batch."""
