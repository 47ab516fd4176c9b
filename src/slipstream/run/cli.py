"""The program `slipstream`: it loads the library, runs one command, and ends without a traceback when it is told to.

Loading PyTorch takes seconds, in which Ctrl-C should end the program as at any other time. So this file imports nothing
but Python's own modules, and `verbs` does all the rest.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: What was typed after `slipstream`; None for `sys.argv`, when the command is the whole program.

    Returns:
        The exit code: 0, 2 for a mistake in what was typed, 130 or 143 after SIGINT or SIGTERM, 1 for anything else.
    """
    # While modules are imported, the exception of a Ctrl-C could be lost, or be taken for a missing package.
    loading = _on_interrupt(signal.default_int_handler, _leave)
    from slipstream.run import verbs

    if loading:
        _on_interrupt(_leave, signal.default_int_handler)
    if arguments is not None:
        return verbs.run(arguments)
    try:
        return verbs.run(sys.argv[1:])
    finally:
        # All is said and saved: a Ctrl-C from here on ends the program at once, where Python would print a traceback.
        _on_interrupt(signal.default_int_handler, signal.SIG_DFL)


def _on_interrupt(former: object, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> bool:
    """Handles Ctrl-C by `handler` if it was `former`'s so far: someone may want it ignored, or have his own."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is former
    if ours:
        signal.signal(signal.SIGINT, handler)
    return ours


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"slipstream: interrupted\n")
    os._exit(128 + number)
