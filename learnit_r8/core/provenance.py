"""What a program runs with: its commit, packages, machine and command line. Files are read, no network is asked."""

from __future__ import annotations

import os
import platform
import re
import sys
import threading
from contextlib import suppress
from pathlib import Path

_PATIENCE = 10.0
"""Seconds for git to say what has changed."""
_SECRET = re.compile(r"(?i)(token|secret|passw|api_?-?key|credential)")
_COMMAND_SHOWN = 2000  # characters


def packages() -> dict[str, str]:
    """Return the versions of the packages that are loaded, as far as these say."""
    found = {}
    for name, module in sorted(sys.modules.copy().items()):
        if "." not in name and name not in sys.stdlib_module_names and not name.startswith("_"):
            version = getattr(module, "__dict__", {}).get("__version__")
            if isinstance(version, str):
                found[name] = version
    return found


def device() -> str:
    """Return the names of the GPUs that the driver lists, or else the processor."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            names += re.findall(r"^Model:\s*(.+)$", path.read_text(errors="replace"), re.MULTILINE)
        except OSError:
            continue
    shown = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown and seen is not None:
        shown.append(f"of them visible: {seen or 'none'}")
    return ", ".join([*shown, f"{os.cpu_count()} x {platform.machine()}"])


def command() -> str:
    """Return the command line, what follows a name such as `--token` left out."""
    words = list(sys.orig_argv)
    for i, word in enumerate(words):
        name, is_given, _ = word.partition("=")
        if _SECRET.search(name) and is_given:
            words[i] = f"{name}=..."
        elif _SECRET.search(word) and word.startswith("-") and i + 1 < len(words):
            words[i + 1] = "..."
    return " ".join(words)[:_COMMAND_SHOWN]


def seeds(own: int) -> dict[str, int]:
    """Return the run's seed, and those of random generators that tell it."""
    found = {"learnit_r8": own}
    if (hashes := os.environ.get("PYTHONHASHSEED", "")).isdigit():
        found["PYTHONHASHSEED"] = int(hashes)
    initial = getattr(sys.modules.get("torch"), "initial_seed", None)
    if initial is not None:
        found["torch"] = int(initial())
    return found


def program_folder() -> Path:
    """Return the folder of the program that runs, or the working directory: in a notebook, or with `python -m`."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(script).resolve().parent if script else Path.cwd()


class Repository:
    """The git repository around a folder: its commit, and whether files differ, which git is asked in another thread.

    Attributes:
        commit: "" where there is no repository, or no commit.
        dirty: Whether tracked files differ from it; None until git has said so.
    """

    def __init__(self, folder: Path) -> None:
        self.commit = ""
        self.dirty: bool | None = None
        self._thread: threading.Thread | None = None
        with suppress(OSError, ValueError):
            root = next((path for path in (folder, *folder.parents) if (path / ".git").exists()), None)
            if root is not None:
                self._thread = threading.Thread(target=self._ask, args=(root,), name="r8-git", daemon=True)
                self._thread.start()
                self.commit = _head(root / ".git")

    def _ask(self, root: Path) -> None:
        import subprocess  # takes longer to load than all that the start waits for

        # Without a lock of its own it disturbs nobody who works in the repository meanwhile.
        line = ["git", "--no-optional-locks", "-C", str(root), "-c", "core.fsmonitor=false"]
        line += ["status", "--porcelain", "--untracked-files=no"]
        with suppress(OSError, subprocess.SubprocessError):
            ran = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE, check=True)
            self.dirty = bool(ran.stdout.strip())

    def asked(self, wait: float) -> bool:
        """Whether git has answered or failed, within so many seconds."""
        if self._thread is not None:
            self._thread.join(wait)
        return self._thread is None or not self._thread.is_alive()


def _head(git: Path) -> str:
    """Return the commit that is checked out; an OSError or "" where that is unclear."""
    if git.is_file():  # a worktree or a submodule
        git = git.parent / git.read_text().removeprefix("gitdir:").strip()
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref:"):
        return head
    ref = head.removeprefix("ref:").strip()
    shared = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
    for folder in (git, shared):
        if (folder / ref).is_file():
            return (folder / ref).read_text().strip()
    packed = (shared / "packed-refs").read_text().splitlines()
    return next((line.split()[0] for line in packed if line.endswith(f" {ref}")), "")
