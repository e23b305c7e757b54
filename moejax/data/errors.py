"""The one exception that bad data, a bad data setting or a bad cache folder raises."""


class DataError(ValueError):
    """One sentence that names the thing that is wrong and the fix; commands print it as it is."""
