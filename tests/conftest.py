"""For all tests."""

import os
import signal

# One thread a process, in children too: on several threads a sum's last bits depend on their number, and the suite
# runs on all cores as it is. Set before numpy and torch are loaded.
os.environ["OMP_NUM_THREADS"] = "1"

# Shells start background jobs with Ctrl-C ignored, and children inherit that; the tests of signals need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
