"""What a user can mend: one exception, one sentence that says what, got, need, do."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something given from outside cannot be used: a config, a file, a data set, a checkpoint.

    The message is written for the user. The command line prints it alone and exits with code 2.
    """


def unknown(kind: str, word: str, options: Iterable[str]) -> InputError:
    """The error for a name that is not one of `options`, with the nearest one suggested."""
    options = sorted(options)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    return InputError(f'unknown {kind} "{word}".{hint} Valid: {", ".join(options) or "none"}.')


class RestartError(RuntimeError):
    """What befell this process befell it from outside, such as a peer that died.

    The same command goes on from the last checkpoint. The command line exits with code 75.
    """


EXIT = {InputError: 2, RestartError: 75, FloatingPointError: 76, KeyboardInterrupt: 130}


def exit_code(error: BaseException) -> int:
    """The command line's exit code for what it ends with; 1 is a defect."""
    return next((code for kind, code in EXIT.items() if isinstance(error, kind)), 1)
