"""The exception for everything a user can put right."""


class UserError(Exception):
    """A mistake in what the user gave: a path, a value, a file, a shape that does not fit.

    The message is one clear sentence that names the thing and the fix. Commands print it alone,
    without a traceback, and exit with status 2.
    """
