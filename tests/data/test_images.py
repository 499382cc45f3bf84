import io

import numpy as np
import pytest
from PIL import Image

from dist_obdsd.data.images import examine


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_image_can_be_reduced(mode: str) -> None:
    grey = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "TIFF" if mode == "CMYK" else "PNG")
    suffix, smaller = examine(stream.getvalue(), 24)
    assert suffix == "png"
    assert smaller is not None
    small = np.asarray(Image.open(io.BytesIO(smaller)).convert("L")).astype(int)
    assert small.shape == (24, 32)
    tolerance = 140 if mode == "1" else 12  # black and white dots stay coarse
    assert np.abs(small - grey[1::2, 1::2]).max() <= tolerance
    assert examine(stream.getvalue(), 48) == ("tif" if mode == "CMYK" else "png", None)


def test_image_formats_that_nobody_reads_are_refused() -> None:
    with pytest.raises(ValueError, match="its format is none of AVIF, BMP, GIF, JPEG"):
        examine(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    stream = io.BytesIO()
    Image.new("F", (4, 4)).save(stream, "TIFF")
    with pytest.raises(ValueError, match="floating-point"):
        examine(stream.getvalue())
