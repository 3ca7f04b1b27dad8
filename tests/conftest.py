"""For all tests."""

import signal

# A shell without job control starts what it puts into the background with SIGINT ignored, and every process below
# inherits that: the tests that send SIGINT would test nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
