"""TensorBoard's event files, written by hand: a few fields of one message need neither TensorBoard nor protobuf.

A file is a row of TFRecords (length, masked CRC-32C of the length, an Event message, masked CRC-32C of it), as
tensorboard/compat/tensorflow_stub/io and tensorboard/compat/proto/event.proto have them.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
_MASK_DELTA = 0xA282EAD8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types
_SESSION_START = 1
_RGB = 3


class EventFile:
    """Scalars and pictures by step, for TensorBoard.

    Args:
        folder: made on the way; every session writes a file of its own.
        step: where this session begins; what earlier ones have from later steps on is void.

    Raises:
        OSError: it can't be written, here and in `add`.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._write(_string(3, "brain.Event:2"))
        self._write(_number(2, step + 1) + _bytes(7, _number(1, _SESSION_START)))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """The numbers of one step, by tag."""
        values = [_bytes(1, _string(1, tag) + _key(2, _FIXED32) + struct.pack("<f", value)) for tag, value in scalars.items()]
        self._write(_number(2, step) + _bytes(5, b"".join(values)))

    def show(self, step: int, pictures: Mapping[str, tuple[bytes, tuple[int, int]]]) -> None:
        """Pictures of one step, by tag: the content of an image file, and (width, height)."""
        values = []
        for tag, (content, (width, height)) in pictures.items():
            picture = _number(1, height) + _number(2, width) + _number(3, _RGB) + _bytes(4, content)
            values.append(_bytes(1, _string(1, tag) + _bytes(4, picture)))
        self._write(_number(2, step) + _bytes(5, b"".join(values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, fields: bytes) -> None:
        event = _key(1, _FIXED64) + struct.pack("<d", time.time()) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))
        self._file.flush()


def _table() -> list[int]:
    entries = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        entries.append(byte)
    return entries


_CRC_TABLE = _table()


def _masked_crc(content: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _key(field, _VARINT) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(content)) + content


def _string(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())
