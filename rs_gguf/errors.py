"""The one exception family. A message says what was wrong, where, and what to do about it.

The command line prints the message and exits with `exit_code`; it never shows a traceback for these.
"""


class RsGgufError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 2


class InputError(RsGgufError):
    """A file, option, array or model that the user gave cannot be used as it is."""


class VerificationError(RsGgufError):
    """The work ended, but its result does not pass: a check, a proof or the safety gate."""

    exit_code = 1


def escape_control_chars(text: object) -> str:
    """A stranger's text without the control characters that would steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
