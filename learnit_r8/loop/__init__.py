"""The scheduler's own parts: each does one thing that the loop in `scheduler.py` asks for."""
