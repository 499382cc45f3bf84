"""The sections of a configuration. Every field has its meaning beside it."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dist_obdsd.config.base import Count, Location, NonNegative, Positive, Section, read_names
from dist_obdsd.config.registry import BACKBONES, METRICS, TARGETS

SELECT_BY = ("map@r", "r_precision", "map@1000", "map@c", "nmi", "f1")  # of which more is better, as of Recall@k
AUGMENTATIONS = ("none", "crop", "strong", "affine")
Metric = Annotated[str, AfterValidator(METRICS.check)]
REFUSED_STAGES = {
    0: "ZeRO stage 0 spreads nothing over the ranks, as DDP; set strategy=ddp, or stage 1 or 2",
    3: "ZeRO stage 3 would cut up the weights, of which the progressive teacher is a copy; set stage 1 or 2, or "
    "strategy=fsdp, which cuts up both networks",
}


def _check_select_by(name: str) -> str:
    kind, _, k = name.partition("@")
    if name not in SELECT_BY and not (kind == "recall" and k.isdecimal()):
        raise ValueError(f"{name!r} cannot choose an epoch; give recall@1 (or another k) or {', '.join(SELECT_BY)}")
    return name


def _check_augment(name: str) -> str:
    if name not in AUGMENTATIONS and ":" not in name:
        raise ValueError(f"{name!r} is none of {', '.join(AUGMENTATIONS)} and no package:function; give one of these")
    return name


class DataConfig(Section):
    shards: Location
    """Folder with `manifest.json` and the tars that `dist-obdsd pack` wrote, or where they are remote a URL or a
    `pipe:` command, in which `{file}` stands for a file's name (shards/README.md)."""
    cache: Location | None = None
    """Folder that keeps remote shards; ranks and nodes may share it. Unset: every epoch reads them anew."""
    cache_gib: Positive | None = None
    """Size of the cache; beyond it the shards that were not used for longest go. Unset: all of them stay."""
    image_size: Count | tuple[Count, Count] | None = None
    """What the network sees, in pixels: the side of a square, or [rows, columns]. Unset: the backbone's own."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """For other proportions: `crop` cuts the centre out, `pad` adds borders of the mean colour, `squash` distorts."""
    resize: Count | None = None
    """With fit=crop: shorter side before the evaluation's centre crop (256 is usual for 224); unset: image_size's."""
    channels: Literal[1, 3] = 3
    """1 reads grey images, 3 reads RGB."""
    mean: tuple[float, ...] | None = None
    """Per channel, of pixels scaled to [0, 1]; one value serves every channel. Unset: the backbone's own, and for grey
    images the average of its three."""
    std: tuple[Positive, ...] | None = None
    augment: Annotated[str, AfterValidator(_check_augment)] = "crop"
    """`crop`: RandomResizedCrop and horizontal flip (the published one); `strong`: these, random changes of brightness,
    contrast, saturation and hue, and sometimes grey; `affine`: small rotation, shift, scale, shear (for characters,
    where a mirrored one is another one); `none`: as in evaluation; or `package:function`, called with an image (uint8
    [C, H, W]), its own numpy generator and the size (rows, columns) of the image that it returns."""
    crop_scale: tuple[Positive, Positive] = (0.08, 1.0)
    """Smallest and largest share of the image's area that `crop` and `strong` keep."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Decoding processes per rank; 0 decodes in the training process. Never changes a result."""
    lanes: Annotated[int, BeforeValidator(lambda lanes: 0 if lanes == "auto" else lanes), Field(ge=0)] = 8
    """Streams that a global batch is put together from, which the number of ranks must divide; or `auto`: the largest
    power of two up to 64 that divides the batch's groups, kept with the run as that number."""
    window: Count = 8
    """Shards of one lane that are held in memory as encoded bytes at a time."""
    sampling: Literal["epoch", "released"] = "epoch"
    """`epoch`: each image at most once an epoch, so a class stands in batches as often as it has images; `released`:
    classes, each as likely as any other, and images drawn with replacement, as the released code does; every rank
    reads all shards."""
    exif: bool = True
    """Turn images as their EXIF orientation says; false: leave them as they are stored, as the released code does."""
    max_bad_samples: Annotated[int, Field(ge=0)] = 0
    """How many undecodable images each rank replaces from its start or resume on, naming each, before the run stops."""
    decode: Annotated[Literal["cpu"], Field(exclude=True)] = "cpu"
    """Held by checkpoints and configs of earlier versions; the CPU decodes all images."""

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the images that the network sees."""
        assert self.image_size is not None, "a Config fills it in"
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, self.channels):
                raise ValueError(
                    f"data.{name} has {len(values)} values; give one, or data.channels={self.channels} of them"
                )
        if self.crop_scale[0] > self.crop_scale[1] or self.crop_scale[1] > 1:
            raise ValueError(f"data.crop_scale is {list(self.crop_scale)}; give [smallest, largest], both in (0, 1]")
        if self.cache_gib is not None and self.cache is None:
            raise ValueError("data.cache_gib bounds the cache, but data.cache names no folder; set data.cache, too")
        if self.resize is not None and self.fit != "crop":
            raise ValueError(f"data.resize is for data.fit=crop, but that is {self.fit}; leave data.resize out")
        return self


class BatchConfig(Section):
    global_size: Annotated[int, Field(ge=2)] = 112
    """Images in one optimizer step over all ranks (B). Independent of the number of ranks."""
    samples_per_class: Annotated[int, Field(ge=2)] = 2
    """Images of one class in a group (K)."""
    chunk: Count | None = None
    """Images per rank that are embedded with gradient at a time (GradCache), in two passes. Unset: all at once."""


class ModelConfig(Section):
    backbone: Annotated[str, AfterValidator(BACKBONES.check)] = "resnet50"
    """`small_cnn`, a classifier of torchvision (`resnet50`, `convnext_tiny`), `timm/NAME` or your own
    `package:function`, which returns a module. Dropout and stochastic depth are set to 0."""
    embedding_dim: Count = 128
    """Length of the unit-norm embedding (D)."""
    pooling: Literal["own", "avg", "max", "avg+max", "gem", "cls"] | None = None
    """From the last map or tokens to one row: `own` is the model's, `gem` the generalised mean, `cls` the first token.
    Unset: avg for ResNet, SqueezeNet and small_cnn, else own."""
    pretrained: Location = "none"
    """`none`; `torchvision` or `timm` (the library's default weights, downloaded once), or with `:TAG` those of that
    name (torchvision:IMAGENET1K_V1 is what published figures start from); the path of a .pth or .safetensors file; or a
    run's folder or checkpoint, whose last weights are taken."""
    fallback: str | None = None
    """Backbone to train from random weights, all at the embedding layer's rate, where a library's weights are not here
    and cannot be downloaded; unset: that ends the run."""
    freeze: Literal["all"] | Annotated[int, Field(ge=0)] = 0
    """Leave so many blocks, and the stem before them, as they are; `all` trains the embedding layer alone."""
    checkpoint_blocks: bool = False
    """Activation checkpointing: keep only the inputs of blocks and compute the rest again. Slower, less memory."""
    norm: Literal["frozen", "sync", "batch"] = "frozen"
    """BatchNorm: `frozen` keeps the pretrained statistics, `sync` takes them over all ranks (GPUs only), `batch` over
    each rank alone, which makes results depend on the number of ranks. small_cnn has GroupNorm and ignores this."""
    channels_last: bool = True
    """Keep images and convolutions with the channels innermost, as fast kernels want them; the same up to rounding."""
    compile: bool = False
    """Let torch.compile make the kernels of training steps, in a minute or more at the start; the same up to rounding.
    `python -m benchmarks.step model.compile=true` says if it pays. Where it fails, one line says why; runs go on."""

    @property
    def library(self) -> str | None:
        """The library whose weights training begins with, if any."""
        source = self.pretrained.partition(":")[0]
        return source if source in ("torchvision", "timm") else None


class DistillationConfig(Section):
    target: Annotated[str, AfterValidator(TARGETS.check)] = "obdsd"
    weight: NonNegative = 1.0
    temperature: Positive = 1.0
    """Of the student's and the teacher's softmax over the batch."""
    teacher_precision: Literal["same", "bf16"] = "same"
    """Of the teacher's forward pass: the student's, or bf16 also where the student is trained in float32."""
    transition_temperature: Positive = 1.0
    """Of the random walk's transition matrix A (target obdsd)."""
    omega: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """How far the diffusion goes: 0 is psd."""
    mask_self: bool = False
    """Take each image's similarity to itself out of the target's start distribution P."""
    neighbours: Count | None = None
    """The diffusion runs along edges to so many nearest neighbours; unset: to all."""
    mutual: bool = False
    """With `neighbours`: an edge needs both images to be among each other's nearest; else one of them is enough."""
    clip: bool = False
    """Take negative similarities as 0 in the transition matrix. Target obdsd_symmetric always does."""
    power: Positive = 1.0
    """Raise the similarities in the transition matrix to this power; needs `clip`."""
    scope: Literal["global", "rank"] = "global"
    """Images that the target and the student's softmax run over: the global batch, or each rank's own part of it, as
    in a published run per GPU. `rank` is the one objective that depends on the number of ranks."""
    memory: Annotated[int, Field(ge=0)] = 0
    """Teacher embeddings of earlier batches of the epoch that the diffusion also runs over (images)."""
    solver: Literal["auto", "cholesky", "cg"] = "auto"
    """Of the diffusion: `cholesky` for all rows, `cg` (conjugate gradients) for own rows; `auto` takes the fastest."""
    tolerance: Positive = 1e-4
    """Largest L1 error of a target's row; a solve that does not reach it stops the run."""
    memory_gib: Positive | None = None
    """What one rank may spend on matrices over all pairs of images; beyond it they are made anew tile by tile. Unset:
    2 on a CPU, three quarters of what is free on a GPU."""

    @property
    def needs_teacher(self) -> bool:
        return self.target != "none" and TARGETS.load(self.target).needs_teacher

    @property
    def diffuses(self) -> bool:
        return self.target != "none" and TARGETS.load(self.target).graph is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.power != 1 and not self.clip and self.target != "obdsd_symmetric":
            raise ValueError(f"distillation.power={self.power} needs similarities from 0; set distillation.clip=true")
        if self.mutual and self.neighbours is None:
            raise ValueError("distillation.mutual has no effect without distillation.neighbours; set that, too")
        if self.memory and not (self.diffuses and self.scope == "global"):
            raise ValueError(
                f"distillation.memory={self.memory} serves a target that diffuses over the global batch, but target is "
                f"{self.target} and scope {self.scope}; set memory=0, or target=obdsd and scope=global"
            )
        return self


class OptimConfig(Section):
    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Positive = 1e-5
    head_scale: Positive = 1.0
    """The rate of the embedding layer, which begins at random, in units of `lr`; above 1 for pretrained backbones."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Every layer's rate in units of that of the layer after it, from the embedding layer down; 1 is no decay, 0.65 to
    0.9 is usual for vision transformers (BEiT, arXiv 2106.08254)."""
    weight_decay: NonNegative = 4e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD only."""
    schedule: Literal["constant", "step", "cosine"] = "constant"
    milestones: tuple[Count, ...] = ()
    """Epochs at which `step` multiplies the learning rate by `gamma`."""
    gamma: Positive = 0.3
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from 0."""
    clip_norm: Positive | None = None
    """Largest norm of the whole gradient; unset: no clipping."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"optim.schedule is {self.schedule} and optim.milestones {list(self.milestones)}; optim.schedule=step "
                f"needs the epochs at which the rate drops, and no other has any"
            )
        return self


class DeepSpeedConfig(Section):
    stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage: 1 spreads the optimizer's state over the ranks, 2 the gradients, too; unset: the file's, or 1."""
    config: Location | None = None
    """DeepSpeed's own JSON file for bucket sizes and overlap (see launch/zero1.json); batch, precision, optimizer and
    clipping are set here, not there."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stage in REFUSED_STAGES:
            raise ValueError(REFUSED_STAGES[self.stage])
        return self


class FSDPConfig(Section):
    replicate: Count = 1
    """Whole copies of the networks, each sharded over its part of the ranks: with one a node, weights travel within a
    node and only gradients between them."""


class ValidationConfig(Section):
    """Classes held out for model selection: a fraction, named ones, or a fold.

    By default none, so the run trains on all and reports only `last`.
    """

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training classes that is held out; 0 holds out none. Which ones follows from the seed."""
    classes: Annotated[tuple[str, ...], BeforeValidator(read_names)] = ()
    """Names of the classes to hold out, or the path of a text file with one name per line."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Cross-validation: cut the training classes into so many parts, near-equal and by the seed, of which this run
    holds out the one that `fold` says."""
    fold: Annotated[int, Field(ge=0)] = 0
    """Of `folds`: which part, from 0."""
    every: Count = 1
    """Epochs between validations."""
    patience: Count | None = None
    """Stop when so many validations in a row found no better epoch; unset: train all epochs."""
    max_images: Count | None = None
    """Validate on some of the held-out classes, whole ones and by the seed, with at most so many images together."""

    @property
    def holds_out(self) -> bool:
        return bool(self.fraction or self.classes or self.folds)

    @model_validator(mode="after")
    def _check(self) -> Self:
        ways = [name for name in ("fraction", "classes", "folds") if getattr(self, name)]
        if len(ways) > 1:
            raise ValueError(f"validation.{' and validation.'.join(ways)} both say what to hold out; set only one")
        if self.patience is not None and not ways:
            raise ValueError(f"validation.patience={self.patience} needs held-out classes; set validation.fraction")
        if self.fold >= (self.folds or 1):
            raise ValueError(
                f"validation.fold={self.fold} but validation.folds is {self.folds or 'unset'}; "
                f"set validation.fold to a number from 0 to folds - 1"
            )
        return self


class EvaluationConfig(Section):
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("recall", "map@r")
    """`recall`, `map@r`, `r_precision` and `map@c` need a few neighbours, `map@1000` a search for 1,000, `nmi` and `f1`
    a k-means into as many clusters as classes, `distances` (within and between classes, and their ratio) all pairs of
    each class, `rho_spectrum` little."""
    conventions: Literal["correct", "released"] = "correct"
    """`released` repeats what the authors' code does where it differs, so that published tables can be compared: class
    sizes include the query (`map@1000`, `map@c`), queries with nothing to find count as failures, k-means makes as many
    clusters as there are training classes, `distances` are cosine distances, and `rho_spectrum` leaves out the smallest
    singular value."""
    recall_at: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """The k of Recall@k."""
    test: bool = True
    """Measure the test set at the end; false leaves it alone while settings are still being chosen."""
    best_test: bool = False
    """Also measure the test set every `validation.every` epochs and report the best as `best_test`. That chooses the
    epoch on the test set, as papers do, and flatters the result."""
    select_by: Annotated[str, AfterValidator(_check_select_by)] = "map@r"
    """The metric, as it is printed, by which `best_validation`, `best_test` and `validation.patience` tell which epoch
    is better, averaged over named galleries. The released code takes `recall@1`."""
    untrained: bool | None = None
    """Also measure the network before the first step, on the test set or else on the validation classes, for
    comparison. Unset: where it is pretrained."""
    batch_size: Count = 256
    """Images embedded at a time; part of the result's last bits, so it does not follow the number of ranks."""
    backend: Literal["auto", "faiss", "torch"] = "auto"
    """Who proposes neighbours. Both give the same result; `auto` takes the quicker one of those that work here."""
    distance: Literal["cosine", "euclidean"] = "cosine"
    """Who is near. Rows of unit length, such as a network's, are in the same order either way."""


class TrackingConfig(Section):
    kind: Literal["mlflow", "none"] = "mlflow"
    uri: Annotated[str, Field(min_length=1)] = "sqlite:///mlflow.db"
    """The MLflow server (`http://...`) or database. What it misses while it is away is kept in the run folder."""
    experiment: Annotated[str, Field(min_length=1, max_length=500)] = "dist-obdsd"
    parent: str | None = None
    """MLflow's id of a run under which this one is shown, such as that of a comparison."""
    every_steps: Count = 50
    """Steps between two lines on the terminal and two readings of every node's CPU, memory and GPUs."""
    wait_seconds: NonNegative = 10.0
    """How long the end of a run waits for a server that is slow or away; `dist-obdsd replay` sends the rest."""
    log_model: bool = True
    """At the end log the best epoch, or the last where there is no validation, as a model that MLflow can serve."""
    figures: bool = True
    """Draw figures of retrieval, embeddings and a batch into runs/NAME/figures at the end of a run, and track them."""


class CheckpointConfig(Section):
    """A run also saves after every epoch, and when a signal stops it."""

    every_steps: Count | None = None
    """Optimizer steps between checkpoints inside an epoch; unset: not by steps."""
    every_minutes: Positive | None = 15.0
    """Minutes without a checkpoint after which one is written inside an epoch; null: not by time."""
    keep: Count = 2
    """Checkpoints kept besides those that `last` and `best` point to."""
    background: Annotated[bool, Field(exclude=True)] = False
    """Held by checkpoints and configs of earlier versions; training waits while a checkpoint is written."""
