"""One rank that trains as an example does: python -m tests.examples.compare EXAMPLE CONFIG OUT."""

import importlib
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def main(name: str, path: str, out: str) -> None:
    from dist_obdsd import BalancedStream
    from dist_obdsd.config import load_config
    from dist_obdsd.models.embedder import build_embedder

    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    more = {}
    if ranks > 1 and name == "ddp":  # the frameworks open a process group by themselves
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    if ranks == 3:  # the first two share a batch, the third takes no part
        more, ranks = {"group": dist.new_group([0, 1])}, 2
        if rank == 2:
            return
    config = load_config(path, [])
    student = build_embedder(config, torch.device("cpu"))
    data = {key: getattr(config.data, key) for key in ("image_size", "channels", "lanes")}
    stream = BalancedStream(
        config.data.shards, global_batch_size=config.batch.global_size, seed=config.seed, rank=rank, world_size=ranks,
        transform=config.data.augment, num_workers=1, **data,
    )  # fmt: skip
    train = importlib.import_module(name).train
    losses = train(student, stream, config.epochs, config.optim.lr, config.distillation.weight, **more)
    stream.close()
    if rank == 0:
        torch.save({"losses": losses, "student": student.state_dict()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
