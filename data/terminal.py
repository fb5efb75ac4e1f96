"""How a command speaks, writes and ends: UTF-8, closed pipes, files, the exit status."""

import contextlib
import os
import signal
import sys
from pathlib import Path

from dqo import BadInput

SIGPIPE = getattr(signal, "SIGPIPE", 13)  # Windows has none


def run(name, work):
    """work() as the command `name`. Returns the exit status: what work returns, 0 for None; 2
    after bad input, which is one line; 130 after Ctrl-C; 141 if nobody reads the output."""
    speak_utf8()
    try:
        try:
            return work() or 0
        except BadInput as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 128 + SIGPIPE
    finally:
        abandon_closed_pipes()


def speak_utf8():
    """Whatever the console says that it can show: a response may be in any script.

    Each line is written at once, so that a log file can be followed and a closed pipe is noticed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)


def abandon_closed_pipes():
    """Where the reader has gone (as in `| head`, or with the terminal), write to nowhere from now
    on, or Python would complain of it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):  # no file of the system
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def closing_noted(received):
    """Around what is printed: that nobody reads on is noted as a signal is, in a list."""
    try:
        yield
    except OSError:
        abandon_closed_pipes()
        received.append(SIGPIPE)


def check_writable(*names):
    """Refuse a file that cannot be written: now, and not after hours of measuring."""
    paths = [Path(name).resolve() for name in names if name]
    for path in paths:
        if paths.count(path) > 1:
            raise BadInput(f"{path} is named for two outputs: one would overwrite the other")
        is_new = not path.exists()
        try:
            open(path, "a").close()
            if is_new:
                path.unlink()
        except OSError as error:
            raise BadInput(f"cannot write {path}: {error.strerror}") from None


def write_each(ways):
    """ways: {name of a file, or None: function(path) that writes it}. A file that cannot be
    written costs none of the others. Returns a line for each of those."""
    faults = []
    for name, write in ways.items():
        try:
            if name:
                write(Path(name))
        except OSError as error:
            faults.append(f"cannot write {name}: {error.strerror}")
    return faults
