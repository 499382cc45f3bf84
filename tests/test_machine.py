from pathlib import Path

from tests import runs

# Page faults of ten allocations of 64 MiB that are written to, after some that find their place.
FAULTS = """
import resource, sys, torch
from dist_obdsd import machine
if sys.argv[1] == "kept":
    machine.tune_malloc()
torch.set_num_threads(1)
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept(tmp_path: Path) -> None:
    faults = {how: int(runs.program(how, cwd=tmp_path, code=FAULTS).stdout) for how in ("kept", "given back")}
    pages = 10 * 2**26 // 2**21  # at least, even if the kernel gives pages of 2 MiB
    assert faults["kept"] < pages / 2
    assert faults["given back"] >= pages  # the control
