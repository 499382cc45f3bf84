"""Many images cropped, resized and flipped at once, as matrix products, on any device.

What comes out are the pixels that torch's kernel for CPUs gives. That one resizes the rows of an image, then its
columns, with weights of 15 bits, and rounds to uint8 both times. Sums of floats give the same integers while each of
them is exact, so a weight is cut into two parts of 8 bits at most, and no sum of their products with pixels reaches
2^24 (for an image up to 128 times as long as its result). Hence a result depends neither on the device nor on the order
in which it adds up, nor on the images that are resized together.

Legend: n images, C channels, s side of the results, h and w sides of the largest part, p pixels along a side.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dist_obdsd.data.transforms import Frame
from dist_obdsd.transfer import DeviceUploader

TOGETHER = 2**22  # pixels of padded images, or of results where those are larger, in one product: for its memory


def resample(images: Sequence[Tensor], frames: Sequence[Frame], s: int, upload: DeviceUploader | None = None) -> Tensor:
    """``framed`` for each of n images on one device: uint8 [C, H, W] -> uint8 [n, C, s, s].

    The pixels are the same where the square is all of the resized part. Where it is a piece of that they may differ by
    one level, since the kernel gives the weights of all pieces the same number of bits.

    Args:
        upload: to the images' device; made here if it is left out.
    """
    # Images of like size are padded least.
    order = sorted(range(len(images)), key=lambda i: (frames[i].height, frames[i].width))
    # A tensor made on the device from numbers would be a copy that the host waits for.
    upload = upload or DeviceUploader(images[0].device)
    table = upload(torch.tensor([frames[i] for i in order], dtype=torch.float64))
    done = []
    for start, end in stretches([(max(s, frames[i].height), max(s, frames[i].width)) for i in order], TOGETHER):
        parts = [
            images[i][:, f.top : f.top + f.height, f.left : f.left + f.width]
            for i, f in ((i, frames[i]) for i in order[start:end])
        ]
        done.append(_together(parts, table[start:end], s))
    return torch.cat(done)[upload(torch.tensor(order).argsort())]


def stretches(sizes: Sequence[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Cut images of these heights and widths into stretches that, padded to their largest, have ``most`` pixels.

    An image that has more is a stretch of its own.
    """
    start = height = width = 0
    for i, (rows, columns) in enumerate(sizes):
        height, width = max(height, rows), max(width, columns)
        if i > start and (i + 1 - start) * height * width > most:
            yield start, i
            start, height, width = i, rows, columns
    if sizes:
        yield start, len(sizes)


def _together(parts: list[Tensor], table_n9: Tensor, s: int) -> Tensor:
    n, C = len(parts), parts[0].shape[0]
    h, w = (max(part.shape[side] for part in parts) for side in (1, 2))
    padded_nChw = parts[0].new_zeros(n, C, h, w)
    for padded, part in zip(padded_nChw, parts, strict=True):
        padded[:, : part.shape[1], : part.shape[2]] = part
    _, _, height_n, width_n, rows_n, columns_n, down_n, right_n, mirrored_n = table_n9.unbind(1)
    weights, bits_n = _weights(width_n, columns_n, right_n, mirrored_n, s, w)
    across = torch.bmm(padded_nChw.view(n, C * h, w).float(), weights.transpose(1, 2))
    narrow = _rounded(across[:, :, :s], across[:, :, s:], bits_n).view(n, C, h, s)
    weights, bits_n = _weights(height_n, rows_n, down_n, torch.zeros_like(mirrored_n), s, h)
    along = torch.bmm(weights, narrow.transpose(1, 2).reshape(n, h, C * s).float())
    square = _rounded(along[:, :s], along[:, s:], bits_n).view(n, s, C, s)
    return square.transpose(1, 2).to(torch.uint8)


def _weights(
    part_n: Tensor, resized_n: Tensor, first_n: Tensor, mirrored_n: Tensor, s: int, longest: int
) -> tuple[Tensor, Tensor]:
    """Along one side, the weight of every pixel of a part in every pixel of the result.

    They are a triangle around each resulting pixel's centre, as wide as two of its pixels and at least two of the
    part's, with sum 1, as whole numbers of 2^-bits: as many bits as let the largest stay below 2^15, and 22 at most.

    Args:
        part_n: lengths of the parts.
        resized_n: lengths that they are resized to.
        first_n: where in those the result begins.
        mirrored_n: 1 where the result runs backwards.

    Returns:
        float32 [n, 2s, longest]: the weights' upper and their lower 8 bits; and int32 [n]: the bits.
    """
    device = part_n.device
    scale_n11 = (part_n / resized_n)[:, None, None]
    here_s = torch.arange(s, device=device, dtype=torch.float64)
    here_ns1 = (first_n[:, None] + torch.where(mirrored_n[:, None] > 0, s - 1 - here_s, here_s))[:, :, None]
    there_p = torch.arange(longest, device=device, dtype=torch.float64)
    away_nsp = (there_p - scale_n11 * (here_ns1 + 0.5) + 0.5).mul_(1 / scale_n11.clamp(min=1)).abs_()
    weights_nsp = (1 - away_nsp).clamp_(min=0).masked_fill_(there_p >= part_n[:, None, None], 0)
    weights_nsp /= weights_nsp.sum(2, keepdim=True)
    mantissa_n, exponent_n = torch.frexp(weights_nsp.amax((1, 2)))
    bits_n = (15 - exponent_n - (mantissa_n * 2**15 + 0.5 >= 2**15).int()).clamp_(max=22)
    weights_nsp = weights_nsp.mul_((1 << bits_n)[:, None, None]).add_(0.5).floor_()
    upper_nsp = (weights_nsp / 256).floor_()
    return torch.cat([upper_nsp, weights_nsp - 256 * upper_nsp], dim=1).float(), bits_n


def _rounded(upper: Tensor, lower: Tensor, bits_n: Tensor) -> Tensor:
    """The sums that belong to the two parts of the weights, [n, ...] each, as int32 pixels."""
    bits_n = bits_n.view(-1, *[1] * (upper.ndim - 1))
    return (((upper.int() << 8) + lower.int() + (1 << (bits_n - 1))) >> bits_n).clamp_(0, 255)
