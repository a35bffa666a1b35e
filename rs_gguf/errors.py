"""The package's exceptions. A message states what was wrong and where, what is accepted, and what to do.

The command line prints the message without a traceback and exits with `exit_code`.
"""


class RsGgufError(Exception):
    """Base class of every error that this package raises on purpose."""

    exit_code = 2


class InputError(RsGgufError):
    """A file, option, array or model that the user gave cannot be used as it is."""


class VerificationError(RsGgufError):
    """The work is done, but a result failed: a file check, an effect check or the acceptance criteria."""

    exit_code = 1


def escape_control_chars(text: object) -> str:
    """Return `text` with its control characters escaped: untrusted text could control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def excerpt(text: str, most: int) -> str:
    """Return an untrusted text as one line without control characters, cut after `most` characters."""
    line = escape_control_chars(" ".join(text.split()))
    return line if len(line) <= most else f"{line[:most].rstrip()} …"
