"""Initial weights that fit the width of a transformer."""


def linear_std(width: int) -> float:
    """Std of the initial weights of linear layers between tokens of `width`.

    0.02 from 384 (ViT-S) up, as in every published ViT and in BERT. In narrower transformers such
    weights are too small: the blocks hardly change the tokens, and learning starts late. There the
    std grows with 1/sqrt(width), which keeps the gain that 0.02 gives a layer at 768.
    """
    if width >= 384:
        return 0.02
    return 0.02 * (768 / width) ** 0.5
