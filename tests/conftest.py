"""For all tests."""

import signal

# Shells start background jobs with Ctrl-C ignored, and children inherit that; the tests of signals need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
