"""The GPUs that MFU and scripts/plan.py know: peak rates, memory and links, from the makers' data sheets.

Rates are dense (without sparsity). Sources: NVIDIA's data sheets "H200 Tensor Core GPU" (2024), "H100 Tensor Core GPU"
(2023), "A100 Tensor Core GPU" (2021), "L40S" (2023), "V100" (2020), "A10" (2021), "T4" (2019), and the white papers of
the Ada (2022) and Ampere GA102 (2020) architectures. Links: NVLink's rate one way, PCIe's where a card has no NVLink.

What products attain of the peak: S. Bekman, "Maximum Achievable Matmul FLOPS", github.com/stas00/ml-engineering,
compute/accelerator/README.md, table of bf16 by PyTorch 2.6 and 2.7 (cuBLAS, the best of many shapes): H100 SXM 794.5
of 989 TFLOP/s, A100 SXM 271.2 of 312, GH200 with HBM3e (the H200's chip) 828.6 of 989.
"""

import math
import re
from dataclasses import dataclass

from base.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One card; rates in FLOP/s and bytes/s, memory in bytes."""

    name: str
    fp32: float
    tf32: float  # matrix products of float32 under precision bf16 and fp16; fp32's where a card has no TF32
    half: float  # bfloat16 or float16 matrix products, accumulated in float32
    bandwidth: float  # of the card's memory
    memory: float
    link: float  # to the other cards of a node, one way
    # fraction of the peak that the fastest products reach; assumed where not measured
    attained: float = 0.80

    def rate(self, itemsize: int, precision: str) -> float:
        """Peak of matrix products whose operands have `itemsize` bytes, in a run of `precision`."""
        if itemsize <= 2:
            return self.half
        return self.fp32 if precision == "fp32" else self.tf32


GPUS = {
    "h200": Gpu("H200", 67e12, 494.7e12, 989.4e12, 4.8e12, 141e9, 450e9, 0.836),
    "h100": Gpu("H100", 67e12, 494.7e12, 989.4e12, 3.35e12, 80e9, 450e9, 0.803),
    "a100": Gpu("A100", 19.5e12, 156e12, 312e12, 2.039e12, 80e9, 300e9, 0.869),
    "l40s": Gpu("L40S", 91.6e12, 183e12, 362e12, 0.864e12, 48e9, 32e9),
    "v100": Gpu("V100", 15.7e12, 15.7e12, 125e12, 0.9e12, 32e9, 150e9),
    "rtx4090": Gpu("RTX 4090", 82.6e12, 82.6e12, 165.2e12, 1.008e12, 24e9, 32e9),
    "rtx3090": Gpu("RTX 3090", 35.6e12, 35.6e12, 71e12, 0.936e12, 24e9, 32e9),
    "a10": Gpu("A10", 31.2e12, 62.5e12, 125e12, 0.6e12, 24e9, 32e9),
    "t4": Gpu("T4", 8.1e12, 8.1e12, 65e12, 0.32e12, 16e9, 16e9),
}


# behind a name: cards of other rates, and parts of a card
OTHER_CARD = r"(?! (?:NVL|PCIe|Ti|D|Laptop)\b)(?!.* MIG )"


def gpu_by_device_name(name: str) -> Gpu | None:
    """The card of torch.cuda.get_device_name's answer, or None where the table has none: an A10G is
    no A10. A GH200 has the chip of an H200."""
    cards = GPUS.values()
    return next((gpu for gpu in cards if re.search(rf"\bG?{gpu.name}\b{OTHER_CARD}", name)), None)


def parse_gpu(text: str) -> Gpu:
    """A card by its key in the table, or TFLOPS,BANDWIDTH,GB: half-precision TFLOP/s, TB/s and GB.

    Raises UserError for anything else.
    """
    key = text.lower().replace(" ", "").replace("-", "")
    if key in GPUS:
        return GPUS[key]
    try:
        tflops, bandwidth, memory = (float(part) for part in text.split(","))
    except ValueError:
        known = ", ".join(GPUS)
        raise UserError(
            f"--gpu {text}: not a known GPU ({known}); give its half-precision TFLOP/s, memory TB/s and GB, "
            "such as 312,2.0,80"
        ) from None
    if not all(0 < figure < math.inf for figure in (tflops, bandwidth, memory)):
        raise UserError(f"--gpu {text}: TFLOP/s, TB/s and GB must be finite numbers above 0")
    half = tflops * 1e12
    return Gpu(text, half / 16, half / 2, half, bandwidth * 1e12, memory * 1e9, link=32e9)
