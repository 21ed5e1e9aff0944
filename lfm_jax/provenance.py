"""Which code this is."""

import functools
import subprocess
from pathlib import Path


@functools.cache
def commit() -> str | None:
    """The commit checked out where this package lies, with "+changes" where tracked files differ from it; None without one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed: the repository around it, if there is one, is another
        return None
    git = ("git", "-C", str(root))
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")
