"""Which samples are wrong rather than hard, from their losses alone."""
