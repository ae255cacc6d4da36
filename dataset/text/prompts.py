"""What next-token prediction of labels and captions begins with; one is drawn for a sample."""

THINGS, IMAGES = ("objects", "items", "elements"), ("image", "picture", "photograph")
SEEN = (
    " {}",
    " present {}",
    " depicted {}",
    " shown {}",
    " visible {}",
    " captured {}",
    " seen {}",
    " that appear {}",
)
LABEL_PROMPTS = tuple(
    f"The {thing}{seen.format(f'in the {image}')} are"
    for seen in SEEN
    for thing in THINGS
    for image in IMAGES
)  # the first is the one of inference
KINDS = ("brief description", "short account", "clear summary", "concise interpretation")
CAPTION_PROMPTS = tuple(
    f"A {kind} of the {thing} is that" for thing in ("given image", *IMAGES) for kind in KINDS
)
