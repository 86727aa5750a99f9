"""Check of the nvJPEG in use: DALI takes the one that the loader finds first, and with an old one decodes on the CPU in
silence.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from harness.core.errors import UserError

# nvimgcodec 0.9 refuses a window with fancy upsampling, which is what harness/data/decode_dali.py asks for, to an
# nvJPEG before this one.
LEAST = (13, 2)
NAMES = (
    "libnvjpeg.so.13",
    "libnvjpeg.so.12",
    "libnvjpeg.so",
)  # in nvimgcodec's order; a wheel holds the one of its CUDA
MAPS = Path("/proc/self/maps")


def loaded_nvjpeg() -> tuple[tuple[int, int, int], str] | None:
    """Version and file of the nvJPEG in this process; None where no pipeline has loaded one."""
    for name in NAMES:
        try:
            library = ctypes.CDLL(name, os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            continue
        numbers = []
        for field in range(3):  # libraryPropertyType: major, minor, patch
            number = ctypes.c_int(0)
            if library.nvjpegGetProperty(field, ctypes.byref(number)):
                return None
            numbers.append(number.value)
        return (numbers[0], numbers[1], numbers[2]), _file(name)
    return None


def require_nvjpeg() -> str:
    """Version and file of the nvJPEG that the pipelines of this process use, once one has been built.

    Raises:
        UserError: none, or one before LEAST.
    """
    found, least = loaded_nvjpeg(), ".".join(map(str, LEAST))
    remedy = (
        "Let LD_LIBRARY_PATH not name an older CUDA (module unload cuda), so that the nvidia-nvjpeg that pip installed is found; where the "
        "driver allows no CUDA 13, decode on the CPU: data.backend dali_cpu"
    )
    if found is None:
        raise UserError("DALI has loaded no nvJPEG, so that JPEGs would be decoded on the CPU in silence", remedy)
    version, file = found
    text = ".".join(map(str, version))
    if version < LEAST:
        raise UserError(
            f"{file} is nvJPEG {text}; before {least} DALI decodes windows of JPEGs on the CPU in silence", remedy
        )
    return f"{text} ({file})"


def _file(name: str) -> str:
    """Path of a loaded library; only its name where the system does not say."""
    try:
        paths = [
            line.split(maxsplit=5)[-1].strip() for line in MAPS.read_text().splitlines() if "/libnvjpeg.so" in line
        ]
    except OSError:
        return name
    return next((path for path in paths if Path(path).name.startswith(name)), name)
