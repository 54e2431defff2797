"""The frame around every program's main: printable output, and one line for an error that the user can mend.

Bad input, a missing file, a full disk, out-of-memory and Ctrl-C end in one line and an exit code. Every other
exception keeps its traceback, a plain ValueError too, because it is a fault of the code.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from minidoctor.config import UserError

WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. PyTorch reports it as a plain RuntimeError on the CPU and on Apple's GPU."""
    texts = ("can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def exit_code(error: BaseException) -> int | None:
    """Return the exit code of an error that is printed as one line, or None if it keeps its traceback."""
    if isinstance(error, (UserError, *WRONG_PATH)):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 130  # as a shell reports a process that SIGINT ended
    return 1 if isinstance(error, OSError) or is_out_of_memory(error) else None


def run(main: Callable[[], None]) -> None:
    """Run a program's main and exit with code 2 for bad input, 1 for a failure during the work, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an ASCII or Latin-1 terminal gets "\u75db" instead of an exception
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # the log of a background run
    try:
        main()
    except BaseException as error:
        code = exit_code(error)
        if code is None:
            raise
        message = str(error) or ("interrupted" if code == 130 else type(error).__name__)
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
        path = Path(sys.argv[0])
        program = f"minidoctor.{path.parent.name}" if path.name == "__main__.py" else path.name
        print(f"{program}: {line}", file=sys.stderr)
        sys.exit(code)
