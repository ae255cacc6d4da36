"""The exception of the networks for mistakes people can mend."""


class ModelError(ValueError):
    """A configuration or checkpoint that does not fit the network; the message names the key and says the remedy."""

    for_people = True
