"""Whether training is sound, and what brings it back when it is not: detector, backups in RAM, recovery."""
