"""The limits of every reader: how much memory and work a file may ask for.

A file may come from anybody. Its reader takes memory in proportion to the bytes that are really
there, never to a number written in it, and refuses what is above these limits with one sentence
that names the file and the limit. They lie far above honest files.
"""

from base.errors import UserError

MIB, GIB = 1 << 20, 1 << 30

# ---- text, JSON, YAML
TEXT_BYTES = 4 * GIB  # of a text or JSON file that is read whole
SMALL_BYTES = 64 * MIB  # of statistics, counters and lists of classes beside shards
ENTRY_BYTES = 64 * MIB  # of one entry of a JSON list
YAML_BYTES = 16 * MIB
NESTED_LEVELS = 200  # lists in lists; Python's own parser and repr give up at about 1000
YAML_VALUES = 200_000  # of a YAML file, its aliases written out
VOCABULARY_BYTES = 64 * MIB  # of a tokenizer's file, decompressed

# ---- tables and folders
CELL_BYTES = 16 * MIB  # of a cell of a table, or of a text beside an image
TABLE_FLOOR = 1 * GIB  # of text that any table may become; more is bound by EXPANSION
ROW_GROUP_BYTES = 4 * GIB  # of a Parquet file, decompressed: one is in memory at a time
FOLDER_LEVELS = 100  # folders in folders
FOLDER_VISITS = 100  # of one folder, by symbolic links

# ---- shards
MEMBER_BYTES = 256 * MIB  # of a member of a tar or zip file, decompressed
SAMPLE_BYTES = 512 * MIB  # of all members of a sample, and of a TFRecord
SAMPLE_MEMBERS = 1000
NAME_BYTES = 1 * MIB  # of a long member name or a pax header
ZERO_BYTES = 64 * MIB  # of zeros behind a tar archive that are searched for another one
EXPANSION = 200  # times its size that a compressed shard may take on the disk
SHARDS = 1_000_000  # that one pattern or counter names

# ---- images
IMAGE_BYTES = 256 * MIB  # of an encoded image
UPLOAD_BYTES = 32 * MIB  # of one that somebody sends to the demo's page
IMAGE_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: 0.25 GB of RGB

# ---- sizes that an option may ask for; below them the free memory decides (base/memory.py)
WIDTH = 1 << 17  # of any layer, or tokens of a text
BLOCKS = 1000  # of a transformer
SIDE = 1 << 13  # of an image, in pixels
CLASSES = 1 << 26  # or tokens of a vocabulary
QUEUE = 1 << 30  # features kept as negatives
WORKERS = 1000  # loader processes of a process
VIEWS = 1000  # of one image

# ---- pickles
PICKLE_FLOOR = 256 * MIB  # of memory that any pickle may take ...
PICKLE_RATIO = 64  # ... and bytes more for each byte of the file
PICKLE_VALUES = 10_000_000  # that shared containers stand for, written out
TUPLE_VALUES = 1_000_000  # the same of one tuple or frozenset: hashing visits them all
TUPLE_LEVELS = 200  # tuples in tuples: hashing recurses in C
KEY_WORK = 100_000_000  # values hashed as keys of one pickle
EQUAL_HASHES = 1000  # keys of one dictionary or set that share a hash
INTEGER_BYTES = 1024
MODULES = 100_000  # modules of one pickled network


def check_limit(name: object, value: int, limit: int, what: str, remedy: str = "") -> None:
    """UserError where `value` is above `limit`. what: what is counted, as `bytes`."""
    if value > limit:
        raise UserError(over_limit(name, value, limit, what, remedy))


def over_limit(name: object, value: int, limit: int, what: str, remedy: str = "") -> str:
    """The sentence with which a file is refused: file, amount, limit, remedy."""
    tail = f"; {remedy}" if remedy else ""
    return f"{name}: {value:,} {what}, the limit is {limit:,}{tail}"
