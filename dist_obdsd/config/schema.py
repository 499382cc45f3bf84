"""The whole configuration.

Anything impossible is refused here, before a process group or a GPU is touched.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from dist_obdsd.config import sections
from dist_obdsd.config.base import Count, Location, Section
from dist_obdsd.config.ranking import SECTIONS, Ranking
from dist_obdsd.config.registry import BACKBONES, STRATEGIES
from dist_obdsd.config.yaml_file import to_yaml
from dist_obdsd.errors import InputError

S = TypeVar("S", bound=Section)


def auto_lanes(groups: int) -> int:
    """The largest power of two up to 64 that divides a batch's groups."""
    return math.gcd(groups, 64)


class Config(Section):
    """Everything that one run is made from."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the run folder and the tracked run."""
    output: Location = "runs"
    """Folder that holds the run folders."""
    seed: Annotated[int, Field(ge=0)] = 0
    epochs: Count
    precision: Literal["float64", "float32", "bf16"] = "float32"
    """bf16 is autocast in the network; similarities and the diffusion stay in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads per rank for torch."""
    timeout_seconds: Annotated[float, Field(gt=0, le=1e9)] = 600.0
    """How long a rank waits for the others in a collective before the run fails."""
    max_steps: Count | None = None
    """Stop the whole run after this many optimizer steps (for trials); unset: all of them."""
    max_nonfinite_steps: Count = 10
    """Consecutive steps with a NaN or infinite loss or gradient, each skipped, after which the run stops."""
    debug: bool = False
    """Wait for every step's numbers and stop at the first NaN, infinity or target that is no distribution."""
    strategy: Annotated[str, AfterValidator(STRATEGIES.check)] = "ddp"
    """Who sums up the gradients: torch's DistributedDataParallel, DeepSpeed's engine, or torch's FSDP2, which keeps a
    shard of the weights on each rank, for networks that do not fit a GPU. The result is the same."""
    deepspeed: sections.DeepSpeedConfig = sections.DeepSpeedConfig()
    fsdp: sections.FSDPConfig = sections.FSDPConfig()
    data: sections.DataConfig
    batch: sections.BatchConfig = sections.BatchConfig()
    model: sections.ModelConfig = sections.ModelConfig()
    ranking: Ranking = SECTIONS["multi_similarity"]()
    distillation: sections.DistillationConfig = sections.DistillationConfig()
    optim: sections.OptimConfig = sections.OptimConfig()
    validation: sections.ValidationConfig = sections.ValidationConfig()
    evaluation: sections.EvaluationConfig = sections.EvaluationConfig()
    tracking: sections.TrackingConfig = sections.TrackingConfig()
    checkpoint: sections.CheckpointConfig = sections.CheckpointConfig()

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        """Take what is left open from batch and backbone; checkpoints hold it, too."""
        data, model = self.data, self.model
        found: dict[str, Any] = {}
        if None in (data.image_size, data.mean, data.std):
            try:
                found = dict(BACKBONES.input_defaults(model.backbone, model.pretrained))
            except InputError as error:
                raise ValueError(str(error)) from error
            if data.channels == 1:
                found |= {name: (round(sum(found[name]) / len(found[name]), 4),) for name in ("mean", "std")}
        pooling = "avg" if BACKBONES.gives_map(model.backbone) else "own"
        # Copies, since configs share the sections that none of them sets.
        vars(self)["data"] = data = _filled(data, found)
        if data.lanes == 0:  # auto
            lanes = auto_lanes(self.batch.global_size // self.batch.samples_per_class)
            vars(self)["data"] = data = data.model_copy(update={"lanes": lanes})
        vars(self)["model"] = _filled(model, {"pooling": pooling})
        vars(self)["evaluation"] = _filled(self.evaluation, {"untrained": model.pretrained != "none"})
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        data, model, evaluation = self.data, self.model, self.evaluation
        size, k = self.batch.global_size, self.batch.samples_per_class
        groups = size // k
        fitting = [n for n in range(1, min(groups, 64) + 1) if groups % n == 0]
        chooses = self.validation.holds_out or evaluation.best_test
        recalls = [f"recall@{at}" for at in evaluation.recall_at] if "recall" in evaluation.metrics else []
        float64, reads = self.precision == "float64", BACKBONES.source(model.backbone).arguments
        twice = "batch.chunk" if self.batch.chunk else "model.checkpoint_blocks" if model.checkpoint_blocks else None
        for wrong, sentence in (
            (size % k,
             f"batch.global_size={size} is not a multiple of batch.samples_per_class={k}; set it to "
             f"{max(groups, 2) * k} or {(groups + 1) * k}"),
            (groups < 2,
             f"batch.global_size={size} with batch.samples_per_class={k} holds one class; a ranking loss needs at "
             f"least two, so set batch.global_size to {2 * k} or more"),
            (groups % data.lanes,
             f"data.lanes={data.lanes} does not divide the {groups} groups of a batch ({size} images / {k} per class); "
             f"set data.lanes to one of {fitting}"),
            (data.resize is not None and data.resize < min(data.size),
             f"data.resize is {data.resize} but the crop is data.image_size={data.image_size}; set data.resize to at "
             f"least {min(data.size)}"),
            (self.distillation.target != "none" and self.epochs == 1,
             "epochs=1 with distillation has no effect, since the ramp epoch/epochs is 0 throughout; set epochs to 2 "
             "or more, or distillation.target=none"),
            (twice and model.norm != "frozen",
             f"with {twice} BatchNorm would not see each image once, as model.norm={model.norm} needs; set "
             f"model.norm=frozen, or leave {twice} out"),
            (model.compile and model.norm == "sync",
             "model.compile=true would be cut in two at every SyncBatchNorm; set model.norm=frozen or "
             "model.compile=false"),
            (model.compile and self.strategy == "fsdp",
             "strategy=fsdp cannot run compiled networks; set model.compile=false or strategy=ddp"),
            ("channels" not in reads and data.channels != 3,
             f"model.backbone={model.backbone} reads RGB images; set data.channels=3"),
            (model.library and model.library != BACKBONES.library(model.backbone),
             f"{model.library} has no weights for {model.backbone}; set model.pretrained=none or to a file"),
            (chooses and evaluation.select_by not in (*recalls, *evaluation.metrics),
             f"the best epoch is chosen by {evaluation.select_by}; add it to evaluation.metrics (a recall@k also to "
             f"evaluation.recall_at), set evaluation.select_by to one that is measured, or hold out no validation "
             f"classes and set evaluation.best_test=false"),
            (evaluation.best_test and not evaluation.test,
             "evaluation.best_test measures the test set; set evaluation.test=true, or best_test=false"),
            (float64 and self.strategy == "deepspeed",
             "DeepSpeed has no float64; set precision=float32 or strategy=ddp"),
            (float64 and self.distillation.teacher_precision == "bf16",
             "distillation.teacher_precision=bf16 cannot prove anything; set it to same for float64"),
            (float64 and self.device == "cuda",
             "precision=float64 is for proofs on CPU; set device=cpu or precision=float32"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(sentence)
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.output) / self.name

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: the same for the same settings."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        return to_yaml(self.model_dump(mode="json"))


def _filled(section: S, values: Mapping[str, Any]) -> S:
    """Copy a section with values for the settings that it leaves open."""
    return section.model_copy(update={name: v for name, v in values.items() if getattr(section, name) is None})


# Settings that may differ between a run and its continuation: none changes results beyond rounding and tolerance.
CHANGEABLE_ON_RESUME = {
    "output", "threads", "device", "timeout_seconds", "max_steps", "max_nonfinite_steps", "debug",
    "data.workers", "data.shards", "data.cache", "data.cache_gib", "data.max_bad_samples", "evaluation.backend",
    "evaluation.untrained", "tracking", "checkpoint", "strategy", "deepspeed", "fsdp", "distillation.memory_gib",
    "model.fallback",
}  # fmt: skip
