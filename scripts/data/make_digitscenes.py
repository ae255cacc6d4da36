"""Makes DigitScenes, the small real data set on which every script of this repository learns
something within minutes.

    python scripts/data/make_digitscenes.py data/digitscenes
    python scripts/data/make_digitscenes.py data/digitscenes --train 6000 --val 300 --test 300 --size 64 --seed 0

Scenes of one to three coloured handwritten digits (scikit-learn's bundled samples, no download),
written as pre-training pairs, retrieval, VQA, NLVR2, SNLI-VE, RefCOCO+, class folders, WebDataset
and TFRecord shards, CC3M / CC12M / YFCC15M / RedCaps / COCO captions and multi-label targets, with
two small vocabularies. The same arguments give the same bytes; a finished folder is checked and
kept, an unfinished one is started afresh. README.md in the folder describes each file and what
guessing scores. The default takes about 20 s on one core.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.advice import ends_with_advice


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--train", type=int, default=6000, metavar="N", help="training scenes (%(default)s)"
    )
    parser.add_argument(
        "--val", type=int, default=300, metavar="N", help="validation scenes (%(default)s)"
    )
    parser.add_argument(
        "--test", type=int, default=300, metavar="N", help="test scenes (%(default)s)"
    )
    parser.add_argument(
        "--size", type=int, default=64, metavar="PX", help="side of the images, about (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(%(default)s)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DigitScenes made with other arguments"
    )
    return parser.parse_args()


@ends_with_advice
def main() -> int:
    args = arguments()
    from dataset.digitscenes.build import Request, build

    started = time.monotonic()
    request = Request(args.train, args.val, args.test, args.size, args.seed)
    built = build(args.out, request, args.overwrite)
    state = f"made in {time.monotonic() - started:.0f} s" if built else "is complete, nothing to do"
    print(
        f"{args.out}: {args.train} + {args.val} + {args.test} scenes, {state}; see README.md and overview.png there"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
