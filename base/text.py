"""Text and whole numbers as files of others write them."""

import re
from typing import Any

WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}")  # fits into 64 bits


def lenient_text(data: bytes) -> str:
    """UTF-8 text without its byte order mark; bytes that are not UTF-8 become U+FFFD."""
    return data.decode("utf-8-sig", "replace")


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: blanks, control characters, zero-width ones, a byte order mark."""
    return not any(letter.isprintable() and not letter.isspace() for letter in text)


def lines_in(text: str) -> list[str]:
    """The lines of a text. They end with LF or CR LF and with nothing else, as vocabularies need;
    with CR alone where there is no LF at all, as old Macs wrote them."""
    if "\n" not in text:
        text = text.replace("\r", "\n")
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def whole_number(value: object) -> int | None:
    """The whole number that a value is or spells: 3, 3.0, "3", b" 3\\n"; None for any other."""
    if isinstance(value, bytes):
        value = lenient_text(value)
    if isinstance(value, str):
        text = value.strip()
        return int(text) if WHOLE_NUMBER.fullmatch(text) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def clean_surrogates(value: Any) -> Any:
    """Text, or plain data with text in it, with each lone surrogate as U+FFFD: UTF-8 cannot hold
    one."""
    if isinstance(value, str):
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [clean_surrogates(each) for each in value]
    if isinstance(value, dict):
        return {clean_surrogates(key): clean_surrogates(each) for key, each in value.items()}
    return value
