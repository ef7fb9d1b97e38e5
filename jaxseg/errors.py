"""What a user can mend: one exception, one sentence that says what, got, need, do; and how a
command ends."""

import difflib
import errno
import os
import re
import sys
import threading
from collections.abc import Iterable
from typing import Any, NoReturn


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

    The same command goes on from the last checkpoint. The command line exits with RESTART.
    """


OUTSIDE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EIO, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ESTALE),
)  # of an OSError that is about the machine, and no defect
# What `pip install` of jaxseg brings.
NEEDED = ("jax", "flax", "optax", "orbax", "grain", "ml_collections", "numpy", "PIL", "matplotlib")
# How gloo, NCCL and jax's coordinator say that another process has left.
LOST_PEER = re.compile(
    r"gloo|nccl|\bpeer\b|connection|heartbeat|coordination|^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory, as XLA says it."""
    return "RESOURCE_EXHAUSTED" in str(error)


def of_the_machine(error: BaseException) -> bool:
    """Whether the system refused, as a full disk does; also where a library repeats its words."""
    if isinstance(error, OSError):
        return error.errno in OUTSIDE
    return any(os.strerror(number) in str(error) for number in OUTSIDE)


def translated(error: BaseException) -> BaseException:
    """What the command line ends with: an InputError in place of what XLA or the system raised and
    a user can mend, a RestartError in place of a collective that lost a process."""
    if isinstance(error, OSError) and error.errno in OUTSIDE:
        where = f"{error.filename}: " if error.filename else ""
        return InputError(f"{where}{error.strerror}. Mend that, or use another place")
    if isinstance(error, ModuleNotFoundError) and error.name in NEEDED:
        return InputError(
            f"{error.name} is not installed for {sys.executable}. Where jaxseg's scripts installed "
            "it: `. .venv/bin/activate`; else `pip install -e .` in jaxseg's folder"
        )
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return error
    first = (str(error).splitlines() or [""])[0]
    if out_of_memory(error):
        return InputError(
            f"out of memory: {first}. A training needs less with a smaller train.batch or "
            "data.crop, with train.accumulate, train.remat=blocks or mesh.fsdp (`describe --budget "
            "16G` estimates it); eval and predict with a smaller eval.batch or eval.mode=slide"
        )
    return RestartError(f"a peer is gone: {first}") if LOST_PEER.search(first) else error


RESTART = 75  # exit code: the same command goes on; sysexits.h's TEMPFAIL
EXIT = {InputError: 2, RestartError: RESTART, FloatingPointError: 76, KeyboardInterrupt: 130}


def exit_code(error: BaseException) -> int:
    """The command line's exit code for what it ends with; 1 is a defect."""
    return next((code for kind, code in EXIT.items() if isinstance(error, kind)), 1)


def interrupt(*_: Any) -> NoReturn:
    """KeyboardInterrupt, and the end in any case: Python drops one that is raised in a callback."""
    ends_within(3, EXIT[KeyboardInterrupt])
    raise KeyboardInterrupt


def leave(code: int) -> NoReturn:
    """Ends the process, within ten seconds: a thread that hangs in a read keeps nobody."""
    ends_within(10, code)
    sys.exit(code)


def ends_within(seconds: float, code: int) -> None:
    """Ends the process by then, whatever it does."""
    last = threading.Timer(seconds, os._exit, (code,))
    last.daemon = True
    last.start()
