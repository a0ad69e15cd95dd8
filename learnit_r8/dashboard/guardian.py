"""A small shell process that puts the terminal back when this one dies without a chance to do so.

It blocks on a pipe whose only writer is this process. A line means "all is well, leave"; end of file means that the
writer died (SIGKILL, SIGSEGV, SIGTERM's default action, os._exit), and then it restores modes and screen.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time

# Modes are put back only while they are still the view's: a shell that took the terminal over has set its own.
_SCRIPT = """
trap '' INT QUIT TERM HUP TSTP TTOU TTIN
IFS= read -r word
[ -n "$word" ] && exit 0
exec 2>/dev/null <&1
[ "$(stty -g)" = "$2" ] && stty "$1"
printf '%b' "$3"
"""


class Guardian:
    """Watches over a terminal.

    Args:
        tty_fd: The terminal. It is inherited, because `/dev/tty` is gone once a session leader has died.
        saved: Modes to restore, as `stty -g` prints them.
        ours: Modes that the view set, in the same form.
        reset: Bytes that leave the alternate screen and show the cursor.

    Raises:
        OSError: There is no `sh`.
    """

    def __init__(self, tty_fd: int, saved: str, ours: str, reset: bytes) -> None:
        octal = "".join(f"\\0{byte:03o}" for byte in reset)
        reader, self._writer = os.pipe()
        try:
            # Its own process group: a Ctrl-C or a shell's SIGHUP for this job is not for the guardian.
            self._process = subprocess.Popen(
                ["sh", "-c", _SCRIPT, "r8-guardian", saved, ours, octal],
                stdin=reader,
                stdout=tty_fd,
                stderr=subprocess.DEVNULL,
                process_group=0,
                cwd="/",
            )
        except OSError:
            os.close(self._writer)
            raise
        finally:
            os.close(reader)

    def dismiss(self) -> None:
        """Send it home; waits half a second at most."""
        if self._writer < 0:
            return
        writer, self._writer = self._writer, -1
        with contextlib.suppress(OSError):
            os.write(writer, b"leave\n")
        os.close(writer)
        deadline = time.monotonic() + 0.5
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """In a forked child: close the pipe, which otherwise would stay open after the parent's death."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1
        # The parent's child is not this process's to wait for.
        self._process.returncode = 0


def stty_form(tty_fd: int) -> str:
    """Return the terminal's modes as `stty -g` prints them."""
    done = subprocess.run(["stty", "-g"], stdin=tty_fd, capture_output=True, text=True, check=True, timeout=5)
    return done.stdout.strip()
