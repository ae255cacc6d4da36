"""From images to labels with probabilities."""

from torch import Tensor

from models.recognition.decoding import Decoding, Drafts, label_map
from models.recognition.nxtp import Nxtp


class Labeller:
    """Names what images show with one network.

    tokenizer: has `delimiter`, `eos`, `decode` and `pieces.encode`; prompt: token ids before the
    labels, int64 [P]; decouple: labels do not attend to one another.
    """

    def __init__(
        self, model: Nxtp, decoding: Decoding, tokenizer, prompt: Tensor, decouple: bool = True
    ):
        self.model = model
        self.decoding = decoding
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.decouple = decouple

    def drafts(self, image: Tensor) -> Drafts:
        """Rows of label tokens for normalised images float32 [B,3,S,S]."""
        return self.decoding.find(
            self.model,
            self.model.encode_image(image),
            self.prompt,
            self.tokenizer.delimiter,
            self.tokenizer.eos,
            self.decouple,
        )

    def labels(self, drafts: Drafts, index: int) -> list[tuple[str, float]]:
        """Labels of one image with their probabilities, best first."""
        return self.decoding.labels(drafts, index, self.tokenizer.delimiter, self.tokenizer.decode)

    def attention(self, image: Tensor, labels: list[str]) -> list[Tensor]:
        """What each label attends to in a normalised image [1,3,S,S]: see `label_map`."""
        images = self.model.encode_image(image)
        encode = self.tokenizer.pieces.encode
        return [label_map(self.model, images, self.prompt, encode(label)) for label in labels]
