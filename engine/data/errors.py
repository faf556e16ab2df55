"""The one exception of the data pipeline."""


class DataError(Exception):
    """Bad or missing data, or a folder that cannot be used: the message says rule, value, consequence and remedy."""
