"""What a run can be shown on: a terminal's screen, live lines, a notebook, plain lines."""
