"""A searchable folder of images: embeddings on disk, refreshed when files change."""

import hashlib
import logging
import os
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dist_obdsd import console
from dist_obdsd.data.image_folder import find_images
from dist_obdsd.errors import InputError
from dist_obdsd.files import replacing
from dist_obdsd.inference import ImageEmbedder
from dist_obdsd.machine import usable_cores

logger = logging.getLogger(__name__)
Entry = tuple[str, tuple[int, int]]
"""A file's path in the gallery, when it was changed, in ns, and its size in bytes."""


class Match(NamedTuple):
    """An image of the gallery and how like the query it is."""

    path: str
    """Relative to the gallery, with forward slashes."""
    cosine: float


class SearchIndex:
    """The gallery and its embeddings. Several threads may use it."""

    def __init__(self, embedder: ImageEmbedder, gallery: Path, file: Path | None = None) -> None:
        """Embed what ``file`` does not hold yet.

        Args:
            gallery: a folder; images in its subfolders belong to the class of that name.
            file: an ``.npz`` that keeps the embeddings; by default in ``search/`` in the run folder.

        Raises:
            InputError: there is no readable image in the gallery, or the file holds other data or cannot be written.
        """
        stat, folder, whole = embedder.path.stat(), embedder.path.parent, gallery.absolute()
        self._network = f"{embedder.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        run = folder.parent if folder.name == "checkpoints" else folder
        name = f"{whole.name}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]}.npz"
        self.embedder, self.gallery, self.file = embedder, gallery, file or run / "search" / name
        self.files: dict[str, Path] = {}  # of ``paths``; a name that is no UTF-8 has another path
        self.left_out = 0
        self._broken: set[Entry] = set()  # kept in memory alone: the next start tries and names them again
        self._entries: list[Entry] = []
        self._rows_nD = np.empty((0, embedder.dim), np.float32)
        self._lock = threading.Lock()
        self._read()
        self.refresh()

    @property
    def paths(self) -> list[str]:
        """Images relative to the gallery; ``left_out`` more cannot be read."""
        return [path for path, _ in self._entries]

    @property
    def classes(self) -> list[str]:
        """Names of the subfolders that hold images; empty if all lie in one folder."""
        names = sorted({_class_of(path) for path in self.paths})
        return names if len(names) > 1 else []

    def refresh(self) -> None:
        """Embed files that are new or have changed, and forget those that are gone."""
        stamps, files = {}, {}
        for file in find_images(self.gallery, log=False).files:
            with suppress(OSError):  # it has just gone
                stat = file.path.stat()
                stamps[file.name], files[file.name] = (stat.st_mtime_ns, stat.st_size), file.path
        with self._lock:
            self.files = files
            entries = [entry for entry in stamps.items() if entry not in self._broken]
            if entries != self._entries:
                known = dict(zip(self._entries, self._rows_nD, strict=True))
                if new := [entry for entry in entries if entry not in known]:
                    known |= self._embed(new)
                self._entries = [entry for entry in entries if entry in known]
                rows = [known[entry] for entry in self._entries]
                self._rows_nD = np.array(rows, np.float32).reshape(-1, self.embedder.dim)
                self._write()
            self.left_out = len(stamps) - len(self._entries)
            if not self._entries:
                raise InputError(f"no image in {self.gallery} can be read; give a folder of images")

    def search(self, image: Any, top: int, class_name: str | None = None) -> list[Match]:
        """Find the images that are most like one, of one class or of all, best first."""
        with self._lock:
            paths, rows_nD = self.paths, self._rows_nD
            query_D = self.embedder.embed_prepared(self.embedder.prepare(image)[None])[0].numpy()
        cosines = rows_nD @ query_D
        found = np.array([i for i, path in enumerate(paths) if class_name in (None, _class_of(path))], int)
        best = found[np.argsort(-cosines[found], kind="stable")[:top]]
        return [Match(paths[i], float(cosines[i])) for i in best]

    def _embed(self, entries: list[Entry]) -> dict[Entry, np.ndarray]:
        logger.info("embedding %s images of %s ...", f"{len(entries):,}", self.gallery)
        rows: dict[Entry, np.ndarray] = {}
        size = self.embedder.batch_size
        with ThreadPoolExecutor(usable_cores()) as pool, console.bar(len(entries), "images", "embedding") as bar:
            for start in range(0, len(entries), size):
                batch = entries[start : start + size]
                prepared = zip(batch, pool.map(self._prepare, batch), strict=True)
                if good := {entry: image for entry, image in prepared if image is not None}:
                    embedded = self.embedder.embed_prepared(torch.stack(list(good.values())))
                    rows |= zip(good, embedded.numpy(), strict=True)
                bar.update(len(batch))
        return rows

    def _prepare(self, entry: Entry) -> torch.Tensor | None:
        try:
            return self.embedder.prepare(self.files[entry[0]])
        except InputError as error:
            logger.warning(f"{error}; it is left out")
            self._broken.add(entry)
            return None

    def _read(self) -> None:
        try:
            with np.load(self.file) as stored:
                rows_nD, stamps = stored["rows"], map(tuple, stored["stamps"].tolist())
                # An earlier version has NaN where an image is broken.
                if str(stored["network"]) == self._network and not np.isnan(rows_nD).any():
                    self._entries = list(zip(stored["paths"].tolist(), stamps, strict=True))
                    self._rows_nD = rows_nD
        except (OSError, EOFError, zipfile.BadZipFile):
            return  # there is none, or it was cut short: it is made anew
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.file} holds no index of search; name another file with --index") from error

    def _write(self) -> None:
        stamps = np.array([stamp for _, stamp in self._entries], dtype=np.int64).reshape(-1, 2)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as file:
                np.savez(file, network=self._network, paths=np.array(self.paths), stamps=stamps, rows=self._rows_nD)
        except OSError as error:
            raise InputError(f"cannot write {self.file}: {error.strerror}; name another file with --index") from error


def _class_of(path: str) -> str:
    return path.rpartition("/")[0]
