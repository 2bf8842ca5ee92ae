"""A reader with a planted fault: a field that is checked on all ways but one."""

from pathlib import Path

from targets import Target

from placer.errors import PlacerError

_MAGIC = b"PL"


def read(content: bytes, _folder: Path) -> int:
    """Read ``PL`` and a digit, byte by byte; behind ``!`` the digit is not checked."""
    for place, byte in enumerate(_MAGIC):
        if len(content) <= place or content[place] != byte:
            raise PlacerError(f"byte {place} is wrong")
    if len(content) < 4:
        raise PlacerError("it is too short")
    if content[2] == ord("!"):
        return int(content[3:].decode("ascii"))  # unchecked
    return 0


PLANTED = Target(read, (b"PL00000",), "text")
