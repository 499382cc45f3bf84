"""JPEGs decoded, cropped, resized and flipped where the network is (``data.decode=gpu``).

The decoding processes read the headers and draw what is to be taken of each image, as for the CPU; here nvJPEG decodes
all the JPEGs of a batch, and ``resample`` does the rest. Every other row comes decoded, and what the GPU's decoder
refuses is decoded here on the CPU, which decides whether it is broken. With the device ``cpu`` all of it runs
there, for tests.
"""

import io
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from dist_obdsd.config import Config
from dist_obdsd.data.decode_tasks import Bad, Left, Row, decode_row, generator_of
from dist_obdsd.data.decoding_workers import Decoded
from dist_obdsd.data.resampling import resample, stretches
from dist_obdsd.distributed import collectives
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.errors import InputError
from dist_obdsd.transfer import DeviceUploader

TOGETHER = 2**27  # pixels of whole images that are decoded together, which takes 3 bytes for each


class DeviceDecoder:
    """Finishes batches: ``images_b, bad = DeviceDecoder(device, config)(decoded)``."""

    def __init__(self, device: torch.device, config: Config, warn: Callable[[str], None] = print) -> None:
        """
        Args:
            warn: is told of the first JPEG that the device's decoder refuses.
        """
        self.device, self._config, self._warn = device, config, warn
        self._refused: dict[int, str] = {}  # an image's id -> why; it is not asked for again
        self._told = False
        self._upload = DeviceUploader(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, decoded: Decoded) -> tuple[Tensor, list[Bad]]:
        """The images on the device, uint8 [b, C, s, s], and the rows that could not be decoded, in order."""
        with self._on_stream():
            images_b, bad = self._finish(decoded)
        if self._stream is not None:
            using = torch.cuda.current_stream(self.device)
            using.wait_stream(self._stream)
            images_b.record_stream(using)
        return images_b, sorted(decoded.bad + bad, key=lambda bad: bad.row)

    def missing(self) -> str | None:
        """Why the device cannot decode a small JPEG; None: it can."""
        file = io.BytesIO()
        Image.new("RGB", (32, 24), (180, 120, 60)).save(file, "JPEG")
        with self._on_stream():
            (image,) = self._decode([file.getvalue()])
            return None if isinstance(image, Tensor) else image

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _finish(self, decoded: Decoded) -> tuple[Tensor, list[Bad]]:
        rows, done = decoded.rows, []
        asked = [left for left in decoded.left if rows[left.row].id not in self._refused]
        for start, end in stretches([left.size for left in asked], TOGETHER):
            done += self._taken(asked[start:end], rows)
        refused = [left.row for left in decoded.left if rows[left.row].id in self._refused]
        bad = [broken for row in refused if (broken := self._on_cpu(decoded, row))]
        if sum(len(places) for places, _ in done) == len(decoded.images):
            images_b = torch.empty_like(decoded.images, device=self.device)
        else:
            images_b = self._upload(decoded.images)
        for places, images_n in done:
            images_b.index_copy_(0, self._upload(places), images_n)
        return images_b, bad

    def _taken(self, asked: list[Left], rows: list[Row]) -> list[tuple[Tensor, Tensor]]:
        """Places [n] and squares [n, C, s, s] of what the device decodes. The whole images end with this call."""
        taken: list[tuple[Left, Tensor]] = []
        for left, image in zip(asked, self._decode([rows[left.row].data for left in asked]), strict=True):
            if isinstance(image, Tensor):
                taken.append((left, image))
            else:
                self._refused[rows[left.row].id] = image
        if not taken:
            return []
        frames, images = [left.frame for left, _ in taken], [image for _, image in taken]
        return [
            (
                torch.tensor([left.row for left, _ in taken]),
                resample(images, frames, self._config.data.image_size, self._upload),
            )
        ]

    def _on_cpu(self, decoded: Decoded, row: int) -> Bad | None:
        """Decode what the device refused."""
        rows, config = decoded.rows, self._config
        generator = generator_of(rows[row], config)
        bad = decode_row(rows, row, generator, decoded.images[row], config, config.batch.samples_per_class)
        if bad is None and not self._told:
            self._told = True
            reason = self._refused[rows[row].id]
            self._warn(f"the GPU's decoder refuses a JPEG ({reason}); the CPU decodes it, and others like it")
        return bad

    def _decode(self, encoded: list[bytes]) -> list[Tensor | str]:
        """Each image as uint8 [3, H, W] on the device, or why it was refused."""
        if not encoded:
            return []
        if self._stream is not None:
            # The decoder writes into new memory at once, also while work is queued on the current stream that still
            # reads what was there before (https://github.com/pytorch/vision/pull/9606). Here that is no step, but at
            # most the batch before this one.
            self._stream.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of read-only memory, which nobody writes to
            files = [torch.frombuffer(data, dtype=torch.uint8) for data in encoded]
            try:
                return list(decode_jpeg(files, ImageReadMode.RGB, self.device))
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise  # which says nothing about the image
            except (RuntimeError, AttributeError) as error:  # AttributeError: built without nvJPEG
                if len(files) == 1:
                    return [str(error).splitlines()[0]]
        return [image for data in encoded for image in self._decode([data])]


def build_device_decoder(
    config: Config, device: torch.device, say: Callable[[str], None], warn: Callable[[str], None]
) -> DeviceDecoder | None:
    """The decoder that the config asks for, or None where the CPU decodes. Collective.

    Raises:
        InputError: on every rank, when a rank is to decode on a GPU and has none.
    """
    if config.data.decode == "cpu":
        return None
    with raise_on_all_ranks("choosing where to decode"):
        if device.type == "cpu":
            raise InputError("data.decode=gpu, but this run has no GPU; set data.decode=cpu, or run it on a GPU")
    decoder = DeviceDecoder(device, config, warn)
    return decoder if works_everywhere(decoder, say) else None


def works_everywhere(decoder: DeviceDecoder, say: Callable[[str], None]) -> bool:
    """Whether every rank can decode on its device; if not, a line says which cannot, and why. Collective."""
    for rank, reason in enumerate(collectives.gather_json(decoder.missing())):
        if reason is not None:
            say(f"the CPU decodes the images, since rank {rank} cannot decode a JPEG on its GPU: {reason}")
            return False
    return True
