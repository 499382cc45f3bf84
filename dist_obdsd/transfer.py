"""Between a GPU's memory and the host's, without one waiting for the other. On a CPU all of it is already there."""

import torch


class Arriving:
    """A few numbers [n] on their way to the host."""

    def __init__(self, numbers_n: torch.Tensor) -> None:
        self._numbers_n, self._copied = numbers_n, None
        if numbers_n.is_cuda:
            self._numbers_n = numbers_n.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The numbers. Waits until what was queued before their copy is done, not for what came after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers_n.tolist()
