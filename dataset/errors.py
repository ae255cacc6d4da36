"""Two kinds of trouble with data: a file that must be mended, and one sample that can be dropped."""


class DataError(ValueError):
    """An annotation file, folder or shard list that cannot be used; the message names it and says the remedy."""

    for_people = True


class BadSample(ValueError):
    """One unusable sample (unreadable picture, empty caption). It is counted and dropped, within a budget."""
