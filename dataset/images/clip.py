"""Views of an image for dual encoders: weak, strong, BYOL-style, RandAugment; uint8 [3,H,W] in,
uint8 out.

Crops are torchvision's; blur and hue are computed here, several times faster than torchvision's and
with the same result. Draws come from torch's global generator, which the data stream reseeds for
every sample. Views stay uint8 until they are on the device (`normalize`): a quarter of the bytes
for workers, shared memory and the bus.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from base.errors import UserError
from base.knobs import check_choices, knob
from base.limits import SIDE, VIEWS
from base.pixels import IMAGENET, middle
from dataset.images.albef import check_areas, random_box, resize, resized_crop

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue in a grey level (ITU-R 601)


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Views of the images; names and defaults are clip-rocket's."""

    num_augs: int = knob(
        2, "A, local views of every image and caption; 0 for a global view alone", low=0, high=VIEWS
    )
    multicrop_resize: int | None = knob(
        None, "side of the local views in pixels; none = image_size", low=1, high=SIDE
    )
    multicrop_max_scale: float = knob(
        1.0, "largest fraction of the image in a local view", rare=True, low=0, high=1
    )
    weak_min_scale: float = knob(
        0.5, "smallest fraction of the image in a weak view", low=0, high=1
    )
    blur_prob: float = knob(0.5, "probability of blur in strong views", rare=True, low=0, high=1)
    solarize_prob: float = knob(
        0.0, "probability of solarisation in strong views", rare=True, low=0, high=1
    )
    grayscale_prob: float = knob(
        0.2, "probability of grayscale in strong views", rare=True, low=0, high=1
    )
    flip: bool = knob(
        True, "flip half of the strong views horizontally; no where captions say left and right"
    )
    jitter: bool = knob(True, "change the colours of strong views; no where captions name colours")
    strong_min_scale: float = knob(
        0.08, "smallest fraction of the image in a strong view", low=0, high=1
    )
    byol_augment: bool = knob(
        False, "two different strong views, as BYOL's; needs num_augs 2", rare=True
    )
    weak_augment: bool = knob(False, "local views are weak, too", rare=True)
    strong_augment: bool = knob(False, "the global view is strong, too", rare=True)
    randaugment: bool = knob(
        False,
        "the weak view gets RandAugment (compat original: is weak or strong by chance)",
        rare=True,
    )
    interpolation: str = knob(
        "bicubic",
        "interpolation of crops; SLIP's is bilinear",
        choices=("bicubic", "bilinear"),
        rare=True,
    )

    def __post_init__(self):
        check_choices(self)
        if self.num_augs < 0:
            raise UserError(f"num_augs {self.num_augs}: give 0 or more local views")
        if self.byol_augment and self.num_augs != 2:
            raise UserError(
                f"byol_augment makes 2 different local views, not num_augs {self.num_augs}; set num_augs to 2"
            )
        if self.weak_augment and self.strong_augment:
            raise UserError("weak_augment and strong_augment exclude each other; choose one")


@dataclass(frozen=True)
class View:
    """One random view: crop, and with the given probabilities jitter, grey, blur, solarisation,
    flips.

    jitter: strengths of brightness, contrast, saturation and hue; applied with probability 0.8.
    """

    side: int
    scale: tuple[float, float]
    interpolation: str = "bicubic"
    jitter: tuple[float, float, float, float] | None = None
    grey: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0
    flip: float = 0.0
    randaugment: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3,H,W] -> uint8 [3,side,side]"""
        box = random_box(image, self.scale)
        view = resized_crop(image, box, self.side, interpolation=self.interpolation)
        if self.randaugment:
            from torchvision.transforms.v2 import RandAugment

            # two operations at magnitude 9 of 30: the paper's for ResNet-50
            view = RandAugment()(view)
        draws = torch.rand(5).tolist()
        jitter = self.jitter if draws[0] < 0.8 else None
        is_grey = draws[1] < self.grey
        is_blurred = draws[2] < self.blur
        is_solarized = draws[3] < self.solarize
        if jitter or is_grey or is_blurred or is_solarized:
            view = view.contiguous().float()
            if jitter:
                view = color_jitter(view, *jitter)
            if is_grey:
                view = grey_levels(view).expand(3, -1, -1)
            if is_blurred:
                view = gaussian_blur(view, float(torch.empty(()).uniform_(0.1, 2)))
            if is_solarized:
                view = solarize(view)
            view = view.round().to(torch.uint8)
        return view.flip(-1) if draws[4] < self.flip else view


class ImageViews:
    """The global view of an image and its A local ones."""

    def __init__(
        self, side: int, options: ViewOptions, local: int | None = None, compat: str = "none"
    ):
        """side: of the global view. local: A, by default `num_augs`. compat: see
        ViewOptions.randaugment."""
        least, most = options.strong_min_scale, options.multicrop_max_scale
        check_areas("strong_min_scale, multicrop_max_scale", least, most)
        self.local_count = options.num_augs if local is None else local
        small = options.multicrop_resize or side
        weak = View(side, (options.weak_min_scale, 1.0), options.interpolation)
        strong = View(
            small,
            (least, most),
            options.interpolation,
            jitter=(0.4, 0.4, 0.4, 0.1) if options.jitter else None,
            grey=options.grayscale_prob,
            blur=options.blur_prob,
            solarize=options.solarize_prob,
            flip=0.5 * options.flip,
        )
        self.local = [strong]
        global_strong = replace(strong, side=side)
        if options.byol_augment:
            jitter = (0.4, 0.4, 0.2, 0.1) if options.jitter else None
            self.local = [
                replace(strong, jitter=jitter, blur=1.0, solarize=0.0),
                replace(strong, jitter=jitter, blur=0.1, solarize=0.2),
            ]
            global_strong = replace(global_strong, jitter=jitter)
        if options.weak_augment:
            self.local = [replace(weak, side=small)]
        self.glob = [global_strong if options.strong_augment else weak]
        if options.randaugment and compat == "original":
            self.glob = [weak, global_strong]
        elif options.randaugment:
            self.glob = [replace(weak, randaugment=True)]

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [3,H,W] -> uint8 [3,S,S] and [A,3,s,s] (None for A = 0)."""
        chosen = (
            self.glob[int(torch.randint(len(self.glob), ()))]
            if len(self.glob) > 1
            else self.glob[0]
        )
        if not self.local_count:
            return chosen(image), None
        local = torch.stack(
            [self.local[n % len(self.local)](image) for n in range(self.local_count)]
        )
        return chosen(image), local


class EvalView:
    """Shorter side to `small` (by default `side`), bilinear, and the centre: uint8 [3,H,W] -> uint8
    [3,side,side].

    squeeze: both sides to `small`, then the centre.
    """

    def __init__(
        self,
        side: int,
        interpolation: str = "bilinear",
        small: int | None = None,
        squeeze: bool = False,
    ):
        self.side = side
        self.interpolation = interpolation
        self.small = small or side
        self.squeeze = squeeze

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2.functional import center_crop

        high = wide = self.small
        if not self.squeeze:
            image = middle(image)
            height, width = image.shape[1:]
            short = min(height, width)
            high, wide = int(self.small * height / short), int(self.small * width / short)
        return center_crop(resize(image, high, wide, self.interpolation), [self.side, self.side])


def pixel_statistics(
    device: torch.device, mean=IMAGENET[0], std=IMAGENET[1]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in grey levels, float32 [3,1,1] each, for `normalize`."""
    return tuple(torch.tensor(v, device=device).mul(255).view(3, 1, 1) for v in (mean, std))


def normalize(views: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """uint8 [...,3,H,W] on any device to float32, normalised."""
    mean, std = statistics
    return views.float().sub_(mean).div_(std)


# Below, images are float32 [3,H,W] with grey levels 0..255.


def grey_levels(image: Tensor) -> Tensor:
    """float32 [1,H,W]"""
    red, green, blue = image.unbind()
    weights = GREY_WEIGHTS
    return (red * weights[0]).add_(green, alpha=weights[1]).add_(blue, alpha=weights[2])[None]


def color_jitter(
    image: Tensor, brightness: float, contrast: float, saturation: float, hue: float
) -> Tensor:
    """Brightness, contrast and saturation times 1 ± strength, hue turned by ± `hue` of the circle,
    in random order."""
    factors = torch.rand(4).mul_(2).sub_(1).tolist()
    for number in torch.randperm(4).tolist():
        if number == 0:
            image = (image * (1 + brightness * factors[0])).clamp_(0, 255)
        elif number == 1:
            factor = 1 + contrast * factors[1]
            image = (image * factor).add_(grey_levels(image).mean() * (1 - factor)).clamp_(0, 255)
        elif number == 2:
            factor = 1 + saturation * factors[2]
            image = (image * factor).add_(grey_levels(image), alpha=1 - factor).clamp_(0, 255)
        else:
            image = turn_hue(image, hue * factors[3])
    return image


def turn_hue(image: Tensor, fraction: float) -> Tensor:
    """Hue turned by `fraction` of the circle in HSV; value and chroma stay.

    A channel of hue h (in sixths of the circle) is V - C max(0, min(k, 4 - k, 1)) with k = (n + h)
    mod 6 and n = 5, 3, 1 for red, green, blue; min(k, 4 - k) is 2 less the distance of k from 2.
    """
    red, green, blue = image.unbind()
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    inverse = (chroma + 1e-6).reciprocal_()  # grey has no hue, and no chroma for it to matter
    from_blue = (red - green).mul_(inverse).add_(4)
    from_green = (blue - red).mul_(inverse).add_(2)
    sixths = torch.where(value == green, from_green, from_blue)
    sixths = torch.where(value == red, (green - blue).mul_(inverse), sixths)
    out = torch.empty_like(image)
    for channel, n in zip(out, (5, 3, 1), strict=True):
        distance = sixths + (n + 6 * fraction - 2)
        distance.sub_(
            (distance * (1 / 6)).round_(), alpha=6
        ).abs_()  # along the circle, from where the channel is lowest
        torch.addcmul(value, distance.neg_().add_(2).clamp_(0, 1), chroma, value=-1, out=channel)
    return out


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur of standard deviation `sigma` pixels by the kernel of Pillow's GaussianBlur; the border
    is repeated."""
    weights = blur_weights(sigma)
    radius = len(weights) - 1
    for dim in (1, 2):
        size = image.shape[dim]
        padded = torch.cat(
            [image.narrow(dim, 0, 1)] * radius
            + [image]
            + [image.narrow(dim, size - 1, 1)] * radius,
            dim,
        )
        blurred = padded.narrow(dim, radius, size) * weights[0]
        for k in range(1, radius + 1):
            pair = padded.narrow(dim, radius - k, size) + padded.narrow(dim, radius + k, size)
            blurred.add_(pair, alpha=weights[k])
        image = blurred
    return image


def blur_weights(sigma: float) -> list[float]:
    """Right half of the kernel, centre first: three box filters with fractional ends (Gwosdek et
    al., 2011)."""
    variance = sigma**2 / 3  # of each box
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (
        (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    )
    width = 2 * whole + 1 + 2 * end
    box = [end / width, *[1 / width] * (2 * whole + 1), end / width]
    kernel = [1.0]
    for _ in range(3):
        wider = [0.0] * (len(kernel) + len(box) - 1)
        for i, a in enumerate(kernel):
            for j, b in enumerate(box):
                wider[i + j] += a * b
        kernel = wider
    return kernel[len(kernel) // 2 :]


def solarize(image: Tensor, threshold: int = 128) -> Tensor:
    """Grey levels from `threshold` on are inverted."""
    return torch.where(image >= threshold, 255 - image, image)
