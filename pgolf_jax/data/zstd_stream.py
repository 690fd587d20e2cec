"""Reading files that Zstandard compressed, of which a little can stand for a lot."""

import io
from pathlib import Path
from typing import BinaryIO

from pgolf_jax.errors import UserError

_MAX_WINDOW = 1 << 27  # as --long makes them; a frame that asks for more is refused before memory is taken


class ZstdStream(io.RawIOBase):
  """Reads consecutive zstd frames and, unlike the library's reader, refuses a file that ends inside one.

  The file is decompressed a few bytes at a time, since a hundred kilobytes of it can stand for gigabytes of text.
  """

  PIECE = 1 << 8  # bytes decompressed at a time, to 8 MiB at most: zstd makes a block of 128 KiB of four bytes

  def __init__(self, file: BinaryIO, path: Path):
    import zstandard  # a machine that only measures has it not

    self._file, self._path, self._zstandard = file, path, zstandard
    self._packed, self._at = b"", 0  # what was read of the file, and how much of it is decompressed
    self._start_frame()
    self._ready = memoryview(b"")

  def _start_frame(self) -> None:
    self._frame = self._zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
    self._is_inside = False

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._ready and self._decompress_more():
      pass
    n = min(len(buffer), len(self._ready))
    buffer[:n], self._ready = self._ready[:n], self._ready[n:]
    return n

  def _decompress_more(self) -> bool:
    """Decompresses the next stretch of the file; returns false at its end."""
    if self._at == len(self._packed):
      self._packed, self._at = self._file.read(1 << 17), 0
    packed = self._packed[self._at : self._at + self.PIECE]
    if not packed:
      if self._is_inside:
        raise UserError(f"{self._path}: the file ends in the middle of its zstd data; fetch it again")
      return False
    self._is_inside = True
    try:
      self._ready = memoryview(self._frame.decompress(packed))
    except self._zstandard.ZstdError as error:
      place = self._file.tell() - len(self._packed) + self._at + len(packed)
      if "too much memory" in str(error):
        raise UserError(f"{self._path}: made with a window of zstd above {_MAX_WINDOW} bytes; use --long=27") from error
      raise UserError(f"{self._path}: damaged zstd data before byte {place} ({error}); fetch the file again") from error
    self._at += len(packed)
    if self._frame.eof:
      self._at -= len(self._frame.unused_data)
      self._start_frame()
    return True
