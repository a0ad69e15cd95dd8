"""Figures of speed, memory and learning, each against a named rival in the same run."""
