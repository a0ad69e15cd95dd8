"""Terminals and consoles: what is drawn on them, typed into them and printed beside."""
