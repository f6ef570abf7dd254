"""The process that locks the clock of the GPU, and unlocks it when its standard input ends.

That happens however the process that started it ends, killed included. It answers with one JSON line on standard
output; its exit status is not 0 where the clock may still be locked.
"""

from __future__ import annotations

import json
import signal
import sys

from dsc_split.engines.gpu._state import lock_clocks, unlock_clocks
from dsc_split.errors import BackendUnavailable, DscError, UsageError

__all__ = ["main"]

KINDS: dict[type[DscError], str] = {UsageError: "usage", BackendUnavailable: "unavailable"}


def main() -> None:
    """Lock, wait, unlock. Argument: the clock in MHz."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        lock_clocks(int(sys.argv[1]))
    except DscError as e:
        answer = {"ok": False, "kind": KINDS.get(type(e), "failed"), "reason": str(e)}
        print(json.dumps(answer), file=sys.stdout, flush=True)
        return
    try:
        print(json.dumps({"ok": True}), file=sys.stdout, flush=True)
        sys.stdin.buffer.read()
    finally:
        unlock_clocks()


if __name__ == "__main__":
    main()
