"""A run as its record tells it: what dashboard, `r8 watch` and report have in common."""
