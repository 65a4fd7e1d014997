"""Running a program so that bad input is one line on stderr and exit code 2."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from absl import app, flags, logging

from experiments import log

BAD_INPUT = 2


def run(main: Callable[[list[str]], int], *, positional: bool = False) -> NoReturn:
    """Parses the flags, runs `main(argv)` and exits with what it returns.

    Args:
      main: takes the arguments that are no flags. A `BadInput` it raises is printed as
        `error: ...`; `--verbosity=1` shows where it comes from.
      positional: whether there may be any, beside the program's name.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if flags.FLAGS["verbosity"].using_default_value:
                logging.set_verbosity(logging.ERROR)  # Orbax talks
            return rest
        except (AttributeError, KeyError) as error:
            sys.exit(refuse(_unknown(error, argv)))
        except Exception as error:  # config files raise what they like
            sys.exit(refuse(error))

    def guarded(argv: list[str]) -> int:
        try:
            if len(argv) > 1 and not positional:
                raise BadInput(f"unexpected arguments: {' '.join(argv[1:])}")
            return main(argv)
        except BadInput as error:
            logging.debug("bad input", exc_info=error)
            return refuse(error)
        except KeyboardInterrupt:  # before or after training: nothing to save
            return 128 + signal.SIGINT

    app.run(guarded, flags_parser=parse)
    raise AssertionError("app.run exits")


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """Within it, what the user can put right becomes a `BadInput`.

    That is values, files, and packages that a path asks for, as gs:// does.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise BadInput(str(error)) from error


class BadInput(ValueError):
    """Something that the user can put right, found before training; one line."""


def _unknown(error: Exception, argv: Sequence[str]) -> BadInput:
    """What to say of a key that a config does not have.

    ml_collections tells the key alone, in quotes within quotes, and what is like it.
    """
    told = str(error).replace("\\n", "\n").translate(str.maketrans("", "", "\\\"'"))
    key, *advice = told.splitlines() or [""]
    for argument in argv:
        if argument.partition("=")[0].rpartition(".")[2] == key:
            key = argument
    why = (
        "; sparse holds what its method takes, and no more" if ".sparse." in key else ""
    )
    return BadInput(" ".join((f"{key}: the config has no such key{why}.", *advice)))


def refuse(error: Exception) -> int:
    """Prints the error as one line on stderr and returns the exit code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        # What a config file raises comes wrapped in its traceback, the error last.
        lines = [lines[-1].removeprefix("ValueError: ")]
    log.warn(f"error: {' '.join(lines) or type(error).__name__}")
    return BAD_INPUT
