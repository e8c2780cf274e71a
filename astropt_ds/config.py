"""The run's configuration: typed, validated, one source of truth.

The defaults are the recipe of the AstroPT paper (arXiv 2405.14930); presets add the sizes. All
that a run needs besides (the DeepSpeed dictionary, micro-batches, accumulation) is derived.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from astropt_ds.config_run import (
    CheckpointConfig,
    EnergyConfig,
    EvalConfig,
    HealthConfig,
    RunConfig,
    SnapshotConfig,
    WandbConfig,
)
from astropt_ds.errors import UserError
from astropt_ds.section import Fraction, Momentum, NonNegative, OrAuto, Positive, Section, Stage

LARGEST_MICRO = 16  # images, where memory is not asked
LARGEST_GPU_MICRO = 64  # more do not make its products faster


class ModalityConfig(Section):
    """One kind of observation. Its tokens are patches of ``patch * patch * channels`` values."""

    patch: Positive = 16
    channels: Positive = 3

    @property
    def input_size(self) -> int:
        """Values in a token."""
        return self.patch * self.patch * self.channels


class ModelConfig(Section):
    """Everything that must travel with the weights."""

    layers: Positive
    heads: Positive
    width: Positive
    block_size: Positive = 1024  # tokens the position table holds
    tokeniser: Literal["relu", "aim", "affine"] = "relu"  # AstroPT v1 | v2 and v3 | v3
    attention: Literal["causal", "full"] = "causal"
    objective: Literal["ar"] = "ar"
    orientation: Literal["rows", "columns"] | None = None  # the tokeniser's generation if unset
    modalities: dict[str, ModalityConfig] = Field(default={"images": ModalityConfig()})
    init_from: str | None = None  # a model folder whose weights a new run starts from

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is no multiple of heads={self.heads}")
        if list(self.modalities) != ["images"]:
            raise ValueError(f"modalities={list(self.modalities)}: only 'images' is known")
        if self.orientation is None:
            # AstroPT v1 reads rows first; v2 and v3 transpose the image (x before y).
            inherited = "rows" if self.tokeniser == "relu" else "columns"
            object.__setattr__(self, "orientation", inherited)
        return self

    @property
    def images(self) -> ModalityConfig:
        """The image modality."""
        return self.modalities["images"]

    def architecture(self) -> dict[str, Any]:
        """All keys but where the first weights came from, as JSON holds them."""
        return self.model_dump(mode="json", exclude={"init_from"})


class AttentionConfig(Section):
    """How attention is computed; never changes what is computed."""

    kernel: Literal["auto", "flash", "flash4", "flash3", "flash2", "cudnn", "sdpa", "eager"] = (
        "auto"
    )


class SourceConfig(Section):
    """One of several data sets that are mixed."""

    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0  # of its samples in the mixture


class DataConfig(Section):
    """Where the shards lie and how they are read."""

    path: str | None = None  # a folder or URL of shards with its manifest (tools/make_shards.py)
    sources: dict[str, SourceConfig] = Field(default={})  # or several, each with a name
    cache: str | None = None  # a local folder for remote shards
    cache_gb: Annotated[float, Field(gt=0)] = 100.0  # that it may hold, in 1e9 bytes
    retries: NonNegative = 5  # of a failed transfer, after 1, 2, 4, ... seconds
    image_size: Positive = 512  # stamps are centre-cropped to this side
    workers: NonNegative = 2  # reading processes a rank; 0 reads in the training process
    window: Positive = 16  # shards among which samples are mixed
    augment: Literal["none", "dihedral"] = "none"  # the eight flips and rotations
    max_bad_fraction: Fraction = 0.05  # of the samples so far (1,000 at least) before a run stops

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.path and self.sources:
            raise ValueError("path and sources are both given; one of them would be right")
        return self

    def located(self) -> dict[str, SourceConfig]:
        """Every source by its name.

        Raises:
            UserError: there is none.
        """
        if self.path:
            return {"shards": SourceConfig(path=self.path)}
        if not self.sources:
            raise UserError("data.path is missing: the folder that tools/make_shards.py wrote")
        return self.sources


class BatchConfig(Section):
    """The global batch is fixed; micro-batch and accumulation follow from the number of ranks.

    A micro-batch of ``auto`` images is the largest whose memory plan fits the devices.
    """

    global_images: Positive = 320
    micro: OrAuto[Positive] = None  # images a rank takes at once

    def split(self, ranks: int) -> tuple[int, int]:
        """(micro-batch, accumulation) for a number of ranks; their product is the rank's share.

        A micro-batch that is not settled is the largest up to 16.

        Raises:
            UserError: the global batch cannot be split so; the message names what would fit.
        """
        share, rest = divmod(self.global_images, ranks)
        if rest or not share:
            fits = sorted({max(share, 1) * ranks, (share + 1) * ranks})
            raise UserError(
                f"batch.global_images={self.global_images} is no multiple of {ranks} ranks; "
                f"{' or '.join(map(str, fits))} would be"
            )
        divisors = divisors_of(share)
        if self.micro is None:
            micro = max(n for n in divisors if n <= LARGEST_MICRO)
        elif self.micro in divisors:
            micro = self.micro
        else:
            raise UserError(
                f"batch.micro={self.micro} does not divide a rank's {share} images "
                f"(batch.global_images={self.global_images} over {ranks} ranks); "
                f"one of {', '.join(map(str, divisors))} would"
            )
        return micro, share // micro


def divisors_of(number: int) -> list[int]:
    """Smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


class OptimConfig(Section):
    """AdamW on two groups: weight decay for tensors of two or more dimensions only."""

    lr: Annotated[float, Field(gt=0)] = 1e-3  # peak
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0  # of the global gradient norm


class ScheduleConfig(Section):
    """Linear warm-up from zero, then down to ``floor * lr`` and constant; in updates."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup: NonNegative = 2000
    decay_until: Positive = 29_700
    decay_from: NonNegative | None = None  # wsd: the peak is held until then; 4/5 if unset
    floor: Fraction = 0.1

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.decay_from is not None and self.kind != "wsd":
            raise ValueError(f"decay_from={self.decay_from} needs kind=wsd, not kind={self.kind}")
        if self.kind == "constant":
            return self
        if self.warmup > self.decay_until:
            raise ValueError(f"warmup={self.warmup} ends after decay_until={self.decay_until}")
        if not self.warmup <= self.decay_starts <= self.decay_until:
            raise ValueError(
                f"decay_from={self.decay_starts} lies outside warmup={self.warmup} to "
                f"decay_until={self.decay_until}"
            )
        return self

    @property
    def decay_starts(self) -> int:
        """The update at which the factor leaves the peak."""
        if self.kind != "wsd":
            return self.warmup
        return self.decay_until * 4 // 5 if self.decay_from is None else self.decay_from


class ZeroConfig(Section):
    """What ZeRO partitions: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too.

    ``auto`` is the lowest stage at which enough images at once fit the devices' memory.
    """

    stage: OrAuto[Stage] = 1
    offload: bool = False  # stage 3 only: parameters and optimizer in host memory
    hpz: bool = False  # stage 3 only: weights a second time within each node (ZeRO++)

    @model_validator(mode="after")
    def _check(self) -> ZeroConfig:
        for key in ("offload", "hpz"):
            if getattr(self, key) and self.stage != 3:
                stage = "auto" if self.stage is None else self.stage
                raise ValueError(f"{key}=true needs stage=3, not stage={stage}")
        if self.offload and self.hpz:
            raise ValueError("offload=true and hpz=true exclude each other; one would be right")
        return self

    @property
    def level(self) -> int:
        """The stage, once it is settled.

        Raises:
            ValueError: it is not.
        """
        if self.stage is None:
            raise ValueError("zero.stage=auto has not been settled")
        return self.stage


class Config(Section):
    """A whole run."""

    model: ModelConfig
    attention: AttentionConfig = AttentionConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    zero: ZeroConfig = ZeroConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    health: HealthConfig = HealthConfig()
    run: RunConfig = RunConfig()
    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = False  # event files in the run's folder
    energy: EnergyConfig = EnergyConfig()
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"  # of the blocks, for the backward pass
    compile: bool = False  # the blocks, by torch.compile
    seed: NonNegative = 0

    @model_validator(mode="after")
    def _check(self) -> Config:
        size, patch = self.data.image_size, self.model.images.patch
        if size < patch:
            raise ValueError(f"data.image_size={size} is smaller than a patch of {patch} pixels")
        if size % patch:
            below = size // patch * patch
            raise ValueError(
                f"data.image_size={size} is no multiple of the patch of {patch} pixels; "
                f"{below} or {below + patch} would be"
            )
        if self.tokens_per_image > self.model.block_size:
            largest = int(self.model.block_size**0.5) * patch
            raise ValueError(
                f"data.image_size={size} makes {self.tokens_per_image} tokens, more than "
                f"model.block_size={self.model.block_size}; up to {largest} pixels fit"
            )
        if self.model.attention == "full":
            raise ValueError(
                "model.attention=full with model.objective=ar would show each token its own "
                "target; causal would be right"
            )
        if self.zero.stage == 0 and self.precision == "bf16":
            raise ValueError(
                "precision=bf16 at zero.stage=0 has no fp32 master weights in DeepSpeed; "
                "zero.stage=1 or precision=fp32 would be right"
            )
        return self

    @property
    def tokens_per_image(self) -> int:
        """Patches in an image; the model predicts all of them but the first."""
        return (self.data.image_size // self.model.images.patch) ** 2

    def to_yaml(self) -> str:
        """The resolved configuration, as ``config.yaml`` of the run folder holds it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
