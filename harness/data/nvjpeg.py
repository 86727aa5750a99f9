"""Check of the loaded nvJPEG: DALI takes the first that the dynamic loader finds, and with an old one silently decodes
on the CPU.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from harness.core.errors import UserError

# nvimgcodec 0.9 gives no older nvJPEG a window with fancy upsampling, which harness/data/decode_dali.py asks for.
LEAST = (13, 2)
# In nvimgcodec's order; a wheel contains the one of its CUDA.
NAMES = ("libnvjpeg.so.13", "libnvjpeg.so.12", "libnvjpeg.so")
MAPS = Path("/proc/self/maps")


def loaded_nvjpeg() -> tuple[tuple[int, int, int], str] | None:
    """Version and file of the nvJPEG in this process; None if no pipeline has loaded one."""
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
    """Version and file of the nvJPEG that the pipelines of this process use; call it after one was built.

    Raises:
        UserError: none is loaded, or one older than LEAST.
    """
    found, least = loaded_nvjpeg(), ".".join(map(str, LEAST))
    remedy = (
        "Remove an older CUDA from LD_LIBRARY_PATH (module unload cuda), so that the nvidia-nvjpeg that pip installed "
        "is found; if the driver does not allow CUDA 13, decode on the CPU: data.backend dali_cpu"
    )
    if found is None:
        raise UserError("DALI has loaded no nvJPEG: it would silently decode JPEGs on the CPU", remedy)
    version, file = found
    text = ".".join(map(str, version))
    if version < LEAST:
        raise UserError(
            f"{file} is nvJPEG {text}; before {least} DALI silently decodes windows of JPEGs on the CPU", remedy
        )
    return f"{text} ({file})"


def _file(name: str) -> str:
    """Path of a loaded library, or its name if the system does not tell."""
    try:
        paths = [
            line.split(maxsplit=5)[-1].strip() for line in MAPS.read_text().splitlines() if "/libnvjpeg.so" in line
        ]
    except OSError:
        return name
    return next((path for path in paths if Path(path).name.startswith(name)), name)
