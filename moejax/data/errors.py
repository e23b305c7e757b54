"""The one exception that bad data, a bad data setting or a bad cache folder raises."""

from __future__ import annotations

from moejax.errors import UserError


class DataError(UserError):
    """One sentence that names the thing that is wrong and the fix; commands print it as it is."""
