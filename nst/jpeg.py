"""What the header of a JPEG says and Pillow does not tell: how pixels are coded, and in how many scans."""

from __future__ import annotations

from dataclasses import dataclass

END = b"\xff\xd9"
START_OF_SCAN = b"\xff\xda"
BASELINE, PROGRESSIVE = 0xC0, 0xC2
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))


@dataclass(frozen=True, kw_only=True)
class JpegHeader:
    """`process` is the second byte of the frame's marker (BASELINE, PROGRESSIVE, or one of the rare ones),
    `bits` those of a value. `is_one_scan`: the first scan holds all that there is to decode."""

    process: int
    bits: int
    num_components: int
    is_one_scan: bool


def read_header(data: bytes) -> JpegHeader | None:
    """None where the segments up to the first scan are not as they should be."""
    position, frame = 2, None
    while position + 9 < len(data) and data[position] == 0xFF:
        marker, start = data[position + 1], position + 4
        if marker == 0xFF:  # a byte that fills up
            position += 1
            continue
        if marker in FRAMES:
            frame = (marker, data[start], data[start + 5])
        elif marker == START_OF_SCAN[1]:
            if frame is None:
                return None
            process, bits, num_components = frame
            is_one_scan = process == BASELINE and data[start] == num_components
            return JpegHeader(
                process=process, bits=bits, num_components=num_components, is_one_scan=is_one_scan
            )
        position += 2 + int.from_bytes(data[position + 2 : start])
    return None


def count_scans(data: bytes) -> int:
    """How often the decoder goes over the picture: once for most, ten times for most progressive ones, and as
    often as the file says. A preview in the metadata counts too."""
    header = read_header(data)
    return 1 if header is not None and header.is_one_scan else data.count(START_OF_SCAN)


def is_plain(data: bytes) -> bool:
    """Whether every decoder reads these bytes, and takes all of them: a baseline or progressive JPEG of 8
    bits, gray or in colours, with nothing behind the picture."""
    header = read_header(data)
    return (
        header is not None
        and header.process in (BASELINE, PROGRESSIVE)
        and header.bits == 8
        and header.num_components in (1, 3)
        and data.endswith(END)
    )
