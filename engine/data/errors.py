"""The exceptions of the data pipeline."""


class DataError(Exception):
    """Bad or missing data, or a folder that cannot be used: the message says rule, value, consequence and remedy."""


class ReadError(DataError):
    """A source that could not be read this time: unlike any other DataError, doing the same again may succeed."""
