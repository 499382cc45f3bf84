"""The class split and the schedule that a config asks for."""

from dist_obdsd.config import Config
from dist_obdsd.config.schema import auto_lanes
from dist_obdsd.data.manifest import Manifest, split_classes
from dist_obdsd.data.schedule import EpochPlan, allowed_world_sizes, plan_epoch
from dist_obdsd.errors import InputError


def classes_from(config: Config, manifest: Manifest) -> tuple[list[int], list[int]]:
    """Split the training classes by the section ``validation``: (train, validate)."""
    how = config.validation.model_dump(include={"fraction", "classes", "folds", "fold"})
    return split_classes(manifest, config.seed, **how)


def check_world_size(config: Config, world_size: int) -> None:
    """Raise InputError for a number of ranks that does not divide the lanes."""
    lanes, B, K = config.data.lanes, config.batch.global_size, config.batch.samples_per_class
    if lanes % world_size == 0:
        return
    multiple = K * world_size
    size = max(1, round(B / multiple)) * multiple
    settings = f"data.lanes={'auto' if auto_lanes(size // K) % world_size == 0 else world_size}"
    if size != B:
        settings = f"batch.global_size={size} {settings}"
    raise InputError(
        f"{world_size} ranks do not divide data.lanes={lanes}; start one of {allowed_world_sizes(lanes)} ranks, or set "
        f"{settings} from the start of a run"
    )


def plan_from(config: Config, manifest: Manifest, classes: list[int], epoch: int) -> EpochPlan:
    """Plan one epoch with the sections ``batch`` and ``data``."""
    sizes = config.batch.model_dump(include={"global_size", "samples_per_class"})
    how = config.data.model_dump(include={"lanes", "window", "sampling"})
    return plan_epoch(manifest, classes, seed=config.seed, epoch=epoch, **sizes, **how)
