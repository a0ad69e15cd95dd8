"""The scheduler without its two loops: its parts, its saving, one step."""
