"""Images inside zip files: `images/00/001.zip/007.jpg` is the member 007.jpg of images/00/001.zip."""

import os
import re
import struct
import zipfile
import zlib
from pathlib import Path

from base.errors import BadSample
from base.image_names import existing, spellings
from base.limits import MEMBER_BYTES

END_OF_DIRECTORY = struct.Struct("<4s4H2LH")  # of a zip file
DIRECTORY_ENTRY = struct.Struct("<4s6H3L5H2L")
ZIP_ENDING = re.compile(r"\.zip/", re.IGNORECASE)
TOO_LONG = f"more than {MEMBER_BYTES} bytes"
LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def image_source(root: Path, image: str) -> Path | bytes:
    """What `decode_image` takes: the path of an image, or its bytes out of a zip file. Raises
    BadSample."""
    archive = archive_of(root / image)
    if archive is None:
        return root / image
    return read_member(archive, str(root / image)[len(f"{archive}/") :])


def archive_of(path: Path) -> Path | None:
    """The zip file that an image lies in; None for a file in a folder."""
    text = str(path)
    for found in ZIP_ENDING.finditer(text):
        archive = Path(text[: found.end() - 1])
        if not os.path.isdir(archive):  # also false where the name is none
            return archive
    return None


def read_member(archive: Path, name: str) -> bytes:
    """Content of one member of a zip file. The directory is searched, not parsed, which takes 2.7
    ms a 1000 members.

    Raises BadSample when archive or member is missing or damaged.
    """
    if "\0" in str(archive):  # for which Python has an error of another kind
        raise BadSample(f"{str(archive)!r}: no path of a file")
    try:
        if not archive.is_file():
            archive = existing(archive)
            if archive.exists() and not archive.is_file():
                raise BadSample(f"{archive}: not a regular file")
        with archive.open("rb") as file:
            found = (_quick_member(file, each.encode()) for each in spellings(name))
            data = next((each for each in found if each is not None), None)
        return _any_member(archive, name) if data is None else data
    except OSError as error:
        raise BadSample(f"{archive}: {error.strerror or error}") from None
    except KeyError:
        raise BadSample(f"{archive}: no member {name}") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        struct.error,
        UnicodeEncodeError,
    ) as error:
        raise BadSample(f"{archive}, member {name}: {error}") from None


def _any_member(archive: Path, name: str) -> bytes:
    with zipfile.ZipFile(archive) as opened:
        listed = set(opened.namelist())
        there = next((each for each in spellings(name) if each in listed), name)
        with opened.open(there) as member:
            data = member.read(MEMBER_BYTES + 1)
    if len(data) > MEMBER_BYTES:
        raise zipfile.BadZipFile(TOO_LONG)
    return data


def _inflated(data: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(data, MEMBER_BYTES + 1)
    if len(content) > MEMBER_BYTES:
        raise zipfile.BadZipFile(TOO_LONG)
    return content


def _quick_member(file, name: bytes) -> bytes | None:
    """The member's content, or None where the archive is out of the ordinary and zipfile must look
    at it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - END_OF_DIRECTORY.size))
    end = file.read()
    # else a comment follows, or it is no zip file
    if len(end) < END_OF_DIRECTORY.size or end[:4] != b"PK\5\6":
        return None
    *_, length, start, _ = END_OF_DIRECTORY.unpack(end)
    if start + length > size:  # zip64
        return None
    file.seek(start)
    directory = file.read(length)
    place = -1
    while (place := directory.find(name, place + 1)) >= 0:
        begin = place - DIRECTORY_ENTRY.size
        if begin < 0 or directory[begin : begin + 4] != b"PK\1\2":
            continue
        entry = DIRECTORY_ENTRY.unpack_from(directory, begin)
        flags = entry[3]
        method = entry[4]
        packed = entry[8]
        name_length = entry[10]
        header = entry[16]
        if name_length != len(name):
            continue
        if flags & 1 or method not in (0, 8) or 0xFFFFFFFF in (packed, header):
            return None
        file.seek(header)
        local = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        file.seek(local[-2] + local[-1], os.SEEK_CUR)  # name and extra field
        if packed > MEMBER_BYTES:
            raise zipfile.BadZipFile(TOO_LONG)
        data = file.read(packed)
        data = data if method == 0 else _inflated(data)
        if zlib.crc32(data) != entry[7]:
            raise zlib.error("its checksum is wrong")
        return data
    return None
