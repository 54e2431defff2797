"""TODO"""

import sys
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[], None]) -> None:
    """Run a program's main: bad input ends in one line and exit code 2, a failure on the way in code 1."""
    try:
        main()
    except (
        ValueError,
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
    ) as error:
        code, message = 2, str(error)
    except (OSError, FloatingPointError, MemoryError) as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    else:
        return
    # One line, whatever a file's own words in it were.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(code)
