"""Run a command that dies with its parent: `python leash.py PARENT_PID COMMAND ARG...`.

The command replaces this process, so its pid stays the one that the parent started. On Linux the
kernel then kills it when the parent is gone, however the parent ended (`kill -9` included). It is
set here, between fork and exec, and not by a `preexec_fn`, because running Python in the fork of a process with threads
may deadlock. Elsewhere the command runs without the leash.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Put the leash on and become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent was faster
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606  (the command is given by our own supervisor)


if __name__ == "__main__":
    main()
