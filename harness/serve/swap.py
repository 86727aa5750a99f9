"""The artefact in use, replaced by the next one while requests go on."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.core.manifest import MANIFEST
from harness.serve.opened import Opened

WATCH = 2.0  # seconds between two looks at the path
RETRY = 30.0  # seconds until a folder that could not be opened is tried again unchanged
log = logging.getLogger(__name__)


class Shelf:
    """Holds the open artefact of a path: a folder, or a link that is pointed at the next folder.

    Args:
        path: the artefact folder, or a link to it.
        open_artefact: opens it.

    Attributes:
        current: the artefact in use. A batch takes it once, so that each answer is of one artefact.
        swaps: replacements so far.
        failures: folders that could not be opened so far; the artefact in use was kept.

    Raises:
        UserError: the first one cannot be opened.
    """

    def __init__(self, path: Path, open_artefact: Callable[[Path], Opened]) -> None:
        self.path, self._open = path, open_artefact
        self._seen = self._look()
        self.current = open_artefact(self._seen[0])
        self.swaps = self.failures = 0
        self._loading = asyncio.Lock()

    def _look(self) -> tuple[Path, tuple[int, ...]]:
        """Real folder, and the state of its manifest."""
        folder = Path(os.path.realpath(self.path))
        try:
            state = (folder / MANIFEST).stat()
        except OSError:
            return folder, ()
        return folder, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)

    async def reload(self, encoder: ThreadPoolExecutor) -> bool:
        """Opens the folder in a thread of its own and takes it into use. Where it cannot be opened, the artefact in use
        stays, and the log says why.

        Args:
            encoder: the thread that answers, on which the previous decoder ends.
        """
        async with self._loading:
            self._seen = self._look()
            try:
                new = await asyncio.to_thread(self._open, self._seen[0])
            except Exception as error:  # nothing in a folder may end the service
                self.failures += 1
                log.error("kept artefact %s: %s", self.current.id, error)
                return False
            old, self.current = self.current, new
            self.swaps += 1
            log.warning("artefact %s in place of %s", new.id, old.id)
            await asyncio.get_running_loop().run_in_executor(encoder, old.close)  # behind the batch that may use it
            return True

    async def watch(self, encoder: ThreadPoolExecutor) -> None:
        """Reloads whenever another folder, or another manifest in it, stands at the path; until it is cancelled."""
        failed, waited = False, 0.0
        while True:
            await asyncio.sleep(WATCH)
            waited += WATCH
            seen = self._look()
            if seen[1] and (seen != self._seen or (failed and waited >= RETRY)):
                failed, waited = not await self.reload(encoder), 0.0
