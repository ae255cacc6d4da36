"""Kinds of trouble with data: a file that must be mended, a data set to be fetched, a sample that can be dropped."""


class DataError(ValueError):
    """An annotation file, folder or shard list that cannot be used; the message names it and says the remedy."""

    for_people = True


class MissingData(DataError):
    """A data set that is not on this machine; the message says where it is looked for and how to get it."""


class BadSample(ValueError):
    """One unusable sample (unreadable picture, empty caption). It is counted and dropped, within a budget."""
