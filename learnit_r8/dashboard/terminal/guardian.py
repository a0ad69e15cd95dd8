"""A small shell process that puts the terminal back, and says the last words, when this one dies without a chance to.

It blocks on a pipe whose only writer is this process. "leave" means that all is well; end of file means that the writer
died (SIGKILL, SIGSEGV, abort, SIGTERM's default action, os._exit), and then it restores screen and modes, and shows the
end of what was printed.

The user's shell wakes up at the same time and prints its prompt, sooner or later than that. So the last words are
inserted above the line that the cursor is in, in one write, and the cursor goes back to where it was in that line.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import IO, cast

from learnit_r8.dashboard.terminal.capture import ConsoleFile

LAST_LINES = 15
# Modes are put back only while they are still the view's: a shell that took the terminal over has set its own. It is
# given time for that: one that did so between the look and the deed would be left with the wrong ones.
# Arguments: modes, the view's modes, bytes that leave the screen, console file, its first byte, the process's parent.
_SCRIPT = r"""
trap '' INT QUIT TERM HUP TSTP TTOU TTIN
cr=$(printf '\r') esc=$(printf '\033') shown=yes ckpt=none shell=$6
while IFS= read -r word; do
    case $word in
    leave) exit 0 ;;
    in) shown=yes ;;
    out) shown= ;;
    *) ckpt=${word#at } ;;
    esac
done
[ -n "$shown" ] && printf '%b' "$3"
exec 2>/dev/null <&1
modes() { sleep 0.5; [ "$(stty -g)" = "$2" ] && stty "$1"; }
redraw() { [ "${2:-0}" -gt 2 ] && stty cols $(($2 - 1)) && sleep 0.4 && stty cols "$2"; }
[ -n "$4" ] || { modes "$1" "$2"; exit 0; }
said="it had printed nothing"
if [ "$(wc -c <"$4")" -ge "$5" ]; then
    said=$(tail -c "+$5" <"$4" | tail -c 16384 | tail -n LAST_LINES |
        sed "s/$cr\$//; s/.*$cr//; s/$esc\[[0-?]*[ -\/]*[@-~]//g; s/$esc//g")
fi
size=$(stty size) rows=${size% *} cols=${size#* }
[ "${cols:-0}" -gt 1 ] || rows=24 cols=80
folded() { printf '%s\n' "$1" | sed "s/.\{$cols\}/&\\
/g"; }
words="[r8] the process died without a word; what it printed last:$cr
$(folded "$said" | tail -n "$((rows > 9 ? rows - 7 : 1))" | sed "s/\$/$cr/")"
places="$cr
[r8] console: $4$cr
[r8] newest checkpoint: $ckpt"
n=0 down=
for _ in $(folded "$words
$places" | sed 's/.*/x/'); do n=$((n + 1)) down=$down${esc}D; done
# The places are wrapped by the terminal: they can be copied whole.
printf '%s' "$down$esc[${n}A${esc}7$esc[${n}L$esc[m$esc[?7l$cr$words$esc[?7h
$places${esc}8$esc[${n}B"
modes "$1" "$2"
# A shell that was quicker than all this has its prompt on the screen that was left. One that edits lines draws it anew
# where the size changes, others after an interrupt: that is for people's shells only, which ignore SIGTERM and catch
# SIGINT, and for the one that started the process, once it has the terminal again.
redraw $size
stty -a | grep -q -e -icanon && exit 0
waits_for_people() {
    read -r stat </proc/self/stat && set -- ${stat##*) } && [ "$6" = "$shell" ] || return 1
    while read -r name mask; do
        case $name in
        SigIgn:) [ $((0x$mask >> 14 & 1)) = 1 ] || return 1 ;;
        SigCgt:) [ $((0x$mask >> 1 & 1)) = 1 ] || return 1 ;;
        esac
    done <"/proc/$shell/status"
}
for _ in 1 2 3 4 5 6 7 8 9 10; do
    waits_for_people && exec kill -INT "$shell"
    sleep 0.2
done
printf '[r8] Enter shows the prompt, where there is none\r\n'
""".replace("LAST_LINES", str(LAST_LINES))


class Guardian:
    """Watches over a terminal, which it inherits: `/dev/tty` is gone once a session leader has died.

    Args:
        tty_fd: The terminal.
        saved: Modes to restore, as `stty -g` prints them.
        ours: Modes that the view set, in the same form.
        reset: Bytes that leave the alternate screen and show the cursor.
        prints: Where prints go; None for a view of another process's run, which has no last words.
    """

    def __init__(self, tty_fd: int, saved: str, ours: str, reset: bytes, prints: ConsoleFile | None) -> None:
        self.newest = ""
        octal = "".join(f"\\0{byte:03o}" for byte in reset)
        path, start = ("", 0) if prints is None else (str(prints.path), prints.start)
        # Its own process group: a Ctrl-C or a shell's SIGHUP for this job is not for the guardian.
        self._process = subprocess.Popen(
            ["sh", "-c", _SCRIPT, "r8-guardian", saved, ours, octal, path, str(start + 1), str(os.getppid())],
            bufsize=0, stdin=subprocess.PIPE, stdout=tty_fd, stderr=subprocess.DEVNULL, process_group=0, cwd="/",
        )  # fmt: skip
        self._pipe = cast("IO[bytes]", self._process.stdin)
        os.set_blocking(self._pipe.fileno(), False)
        # At the end it has to be quicker than the shell's prompt; only root may ask for that.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, -20)

    def tell(self, word: str) -> None:
        """Let it know that the screen is "in" or "out", or that the newest checkpoint is "at" a path."""
        with contextlib.suppress(OSError, ValueError):  # it was killed, or sent home
            self._pipe.write(" ".join(word.split("\n")).encode("utf-8", "surrogateescape") + b"\n")

    def checkpoint(self, path: str) -> None:
        if path != self.newest:
            self.newest = path
            self.tell(f"at {os.path.abspath(path)}")

    def dismiss(self) -> None:
        """Send it home; waits half a second at most."""
        self.tell("leave")
        self._pipe.close()
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """In a forked child: close the pipe, which otherwise would stay open after the parent's death."""
        self._pipe.close()
        self._process.returncode = 0  # the parent's child is not this process's to wait for


def stty_form(tty_fd: int) -> str:
    """Return the terminal's modes as `stty -g` prints them."""
    done = subprocess.run(["stty", "-g"], stdin=tty_fd, capture_output=True, text=True, check=True, timeout=5)
    return done.stdout.strip()
