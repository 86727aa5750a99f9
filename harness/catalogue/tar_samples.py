"""The samples of a webdataset tar: runs of members that share a name, see https://github.com/webdataset/webdataset."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

# Extensions of the member that is the sample's image, the preferred first; those of formats that may be refused last.
IMAGES = tuple(
    "jpg jpeg png webp bmp tif tiff jpe jfif mpo dib jp2 j2k jpf jpx j2c jpc ppm pgm pbm pnm pfm gif avif heic "
    "heif".split()
)
SHOWN = 5  # names of members in a reason


class TarSample(NamedTuple):
    """A sample: its name without folder, the members that are read, and why it cannot be one ('' for nothing)."""

    name: str
    image: tarfile.TarInfo
    fields: tarfile.TarInfo | None = None
    text: tarfile.TarInfo | None = None
    reason: str = ""


def tar_samples(tar: tarfile.TarFile, last_dot: bool = False) -> tuple[list[TarSample], Counter[str]]:
    """The samples of an open tar in its order.

    A name goes up to the first dot of the member's name, and members of one name must follow one another. Members
    whose name begins with a dot or has none are passed over.

    Args:
        tar: open for reading.
        last_dot: a name goes up to the last dot.

    Returns:
        The samples, and how many members of each extension belong to none or to a sample that has no use for them. Of
        a sample that cannot be one, `image` is a member to name it by.
    """
    unread: Counter[str] = Counter()
    groups: list[tuple[str, dict[str, tarfile.TarInfo], list[str]]] = []
    for member in tar:
        if not member.isfile():
            continue
        folder, _, file = member.name.rpartition("/")
        name, dot, extension = file.rpartition(".") if last_dot else file.partition(".")
        if not name or not dot or file[0] == ".":
            unread["._*" if file[:2] == "._" else ".*" if file[:1] == "." else "names without a dot"] += 1
            continue
        key, extension = f"{folder}/{name}", extension.lower()
        if not groups or groups[-1][0] != key:
            groups.append((key, {}, []))
        _, members, twice = groups[-1]
        if extension in members:
            twice.append(extension)
        members[extension] = member
    times = Counter(key for key, _, _ in groups)
    apart = {key for key, members, _ in groups if times[key] > 1 and not _of_kind(members, IMAGES)}
    found = []
    for key, members, twice in groups:
        if key in apart or twice:
            reason = f"members twice: {_shown(twice)}" if twice else "members apart: another run of them has this name"
            found.append(TarSample(key, next(iter(members.values())), reason=reason))
        else:
            found += _samples(key.rpartition("/")[2], members, unread)
    return found, unread


def _samples(name: str, members: dict[str, tarfile.TarInfo], unread: Counter[str]) -> list[TarSample]:
    """The sample of a run of members; one for each image where there are several."""
    images = _of_kind(members, IMAGES)
    if not images:
        return [TarSample(name, next(iter(members.values())), reason=f"no image: its members are {_shown(members)}")]
    if len(images) > 1:
        reason = f"several images of one name: {_shown(images)}"
        return [TarSample(name, members[image], reason=reason) for image in images]
    # Beside `jpg`, only `json` and `txt` themselves; beside `input.jpg`, what ends so.
    sidecars = [
        [kind] * (kind in members) if images[0] in IMAGES else _of_kind(members, (kind,)) for kind in ("json", "txt")
    ]
    for several in sidecars:
        if len(several) > 1:
            return [TarSample(name, members[images[0]], reason=f"several members of one kind: {_shown(several)}")]
    read = {images[0], *sidecars[0], *sidecars[1]}
    unread.update(f".{extension.rpartition('.')[2]}" for extension in members if extension not in read)
    fields, text = (members[found[0]] if found else None for found in sidecars)
    return [TarSample(name, members[images[0]], fields, text)]


def _of_kind(members: Mapping[str, tarfile.TarInfo], kinds: tuple[str, ...]) -> list[str]:
    """The extension that is one of `kinds`, by their order; where none is, those whose last part is one."""
    exact = next((kind for kind in kinds if kind in members), None)
    return [exact] if exact else [extension for extension in members if extension.rpartition(".")[2] in kinds]


def _shown(names: Mapping[str, object] | list[str]) -> str:
    return ", ".join(sorted(names)[:SHOWN]) + ", …" * (len(names) > SHOWN)
