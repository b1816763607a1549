"""The two kinds of failure a user sees. Nothing enters this module; every room may raise these."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend: one line that names the value and the way out. Exit code 2, no traceback."""


class VerificationFailure(Exception):
    """An artefact does not match its reference, or a file does not match its hash. Exit code 1."""
