"""Progress bars that ended runs left open."""

from tqdm import tqdm


def close_bars() -> None:
    """Close every bar of this process. tqdm walks over all of them whenever one writes a line, and
    fails if the garbage collector takes an open one away meanwhile."""
    for bar in list(tqdm._instances):
        bar.close()
