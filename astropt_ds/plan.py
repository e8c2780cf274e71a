"""What a run takes before it is started: what fits, what travels, how long it lasts."""

from __future__ import annotations

from typing import Any, NamedTuple

from astropt_ds.config import LARGEST_GPU_MICRO, Config, divisors_of
from astropt_ds.errors import UserError
from astropt_ds.flops import hardware_flops, parameters
from astropt_ds.gpus import Gpu
from astropt_ds.memory import ELEMENT, Memory, kept_weights, memory
from astropt_ds.zero import zero_settings

GB = 1e9
# Of a GPU's memory the driver, the libraries and NCCL take some, and holes between tensors more.
TAKEN, HOLES = 1.5e9, 0.04
ENOUGH = 2048  # tokens at once: a lower stage with fewer costs more than it spares
AUTO_STAGES = (1, 2, 3)
# Of their peak, recomputation included: what others reach on H100 and H200 with models of 3B to 8B.
UTILISATION = 0.45


class Choice(NamedTuple):
    """A way to run.

    Attributes:
        config: with its stage and micro-batch settled.
        accumulation: micro-batches of an update.
        memory: of each device.
        fits: whether that is there.
    """

    config: Config
    accumulation: int
    memory: Memory
    fits: bool

    @property
    def micro(self) -> int:
        """Images that a rank takes at once."""
        assert self.config.batch.micro is not None
        return self.config.batch.micro


def usable(device: float) -> float:
    """Of a GPU's memory, what a training may plan with; bytes."""
    return device * (1 - HOLES) - TAKEN


def with_zero(config: Config, **keys: Any) -> Config:
    """The configuration with other keys of ``zero``."""
    return config.model_copy(update={"zero": config.zero.model_copy(update=keys)})


def best(config: Config, ranks: int, device: float, per_node: int = 8) -> Choice:
    """The largest micro-batch that fits GPUs, or the one that is asked for.

    Args:
        config: its stage settled.
        ranks: one a GPU.
        device: bytes of each GPU.
        per_node: GPUs of a node.

    Raises:
        UserError: the global batch cannot be split over the ranks.
    """
    micro, accumulation = config.batch.split(ranks)
    share = micro * accumulation
    sizes = [n for n in divisors_of(share) if n <= LARGEST_GPU_MICRO]
    sizes = sizes if config.batch.micro is None else [micro]
    plans = [(n, memory(config, ranks, n, True, per_node)) for n in sizes]
    fitting = [(n, plan) for n, plan in plans if plan.peak <= usable(device)]
    micro, plan = fitting[-1] if fitting else plans[0]
    batch = config.batch.model_copy(update={"micro": micro})
    settled = config.model_copy(update={"batch": batch})
    return Choice(settled, share // micro, plan, bool(fitting))


def propose(config: Config, ranks: int, device: float, per_node: int = 8) -> Choice:
    """What ``zero.stage=auto`` and ``batch.micro=auto`` stand for on GPUs.

    The lowest stage at which enough images at once fit, or else the one at which most do.

    Args:
        config: with or without them.
        ranks: one a GPU.
        device: bytes of each GPU.
        per_node: GPUs of a node.

    Raises:
        UserError: the global batch cannot be split over the ranks, or nothing fits.
    """
    if config.zero.stage is not None and config.batch.micro is not None:
        return best(config, ranks, device, per_node)  # asked for: to be tried, whatever the plan
    stages = AUTO_STAGES if config.zero.stage is None else (config.zero.stage,)
    choices = [best(with_zero(config, stage=s), ranks, device, per_node) for s in stages]
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        last = choices[-1]
        raise UserError(
            f"{ranks} GPUs of {device / GB:g} GB are too few: zero.stage={stages[-1]} "
            f"with batch.micro={last.micro} needs {last.memory.peak / GB:.1f} GB of each; more of "
            "them, zero.stage=auto, zero.offload=true or recompute=full would be right; "
            f"batch.micro={last.micro} tries it all the same"
        )
    share = fitting[0].micro * fitting[0].accumulation
    least = min(-(-ENOUGH // config.tokens_per_image), share)
    enough = [choice for choice in fitting if choice.micro >= least]
    return enough[0] if enough else max(fitting, key=lambda choice: choice.micro)


def settle(config: Config, ranks: int, device: float | None, per_node: int = 8) -> Config:
    """The configuration with ``auto`` replaced by what fits.

    Args:
        config: of the run.
        ranks: one a device.
        device: bytes of each GPU; None on processors, where stage 1 is taken and up to 16 images.
        per_node: ranks of a node.

    Raises:
        UserError: as :func:`propose`.
    """
    if device is not None:
        return propose(config, ranks, device, per_node).config
    micro, _ = config.batch.split(ranks)
    batch = config.batch.model_copy(update={"micro": micro})
    config = config.model_copy(update={"batch": batch})
    return with_zero(config, stage=1) if config.zero.stage is None else config


def communication(choice: Choice, ranks: int, per_node: int = 8) -> dict[str, float]:
    """Bytes that each rank sends in a step, and as many it receives, in rings.

    A ring's all-gather or reduce-scatter of S bytes sends (n - 1) / n S from each of n ranks, its
    all-reduce twice that (Rajbhandari et al. 2020, section 7). DeepSpeed all-reduces gradients
    below stage 3, once a step at stages 0 and 1, in each micro-batch at stage 2; 1 and 2 gather
    the weights after the step. Stage 3 scatters gradients in each micro-batch and gathers weights
    in its forward pass, and in its backward pass those that it did not keep. With ``hpz`` only
    the first of these gathers is between nodes (Wang et al. 2023, ZeRO++).

    Returns:
        ``all``: over all ranks; ``node``: within nodes only.
    """
    config, times = choice.config, choice.accumulation
    element, count = ELEMENT[config.precision], parameters(config.model)
    ring = element * count * (ranks - 1) / ranks
    stage = config.zero.level
    if stage < 3:
        return {"all": {0: 2, 1: 3, 2: 2 * times + 1}[stage] * ring, "node": 0.0}
    zero = zero_settings(config.zero, gpu=True)["zero_optimization"]
    passes = 2 - kept_weights(config.model, zero) / count
    if not config.zero.hpz or per_node == 1:  # a node of one rank keeps no second copy
        return {"all": (passes + 1) * times * ring, "node": 0.0}
    local = element * count * (per_node - 1) / per_node
    return {"all": (1 + times) * ring, "node": (passes * times - 1) * local}


def communication_s(sent: dict[str, float], gpu: Gpu, ranks: int, per_node: int = 8) -> float:
    """Seconds that they take if nothing hides them: nodes use all their adapters at once."""
    across = gpu.link if ranks <= per_node else min(gpu.link, gpu.net * per_node)
    return sent["all"] / across + sent["node"] / gpu.link


class Course(NamedTuple):
    """A whole run.

    Attributes:
        step_s: seconds of a step.
        hours: of the run.
        gpu_hours: of all GPUs.
        kwh: at the boards' limit, without the rest of the nodes.
        cost: in the price's currency.
    """

    step_s: float
    hours: float
    gpu_hours: float
    kwh: float
    cost: float | None


def course(
    config: Config, ranks: int, gpu: Gpu, utilisation: float, price: float | None = None
) -> Course:
    """How long a run lasts whose GPUs reach a share of their peak, recomputation included.

    Args:
        config: of the run.
        ranks: one a GPU.
        gpu: their kind.
        utilisation: that share.
        price: of a GPU hour.
    """
    flops = hardware_flops(config.model, config.tokens_per_image, config.recompute)
    step_s = flops * config.batch.global_images / (ranks * gpu.peak(config.precision) * utilisation)
    hours = step_s * config.run.steps / 3600
    gpu_hours = hours * ranks
    cost = None if price is None else gpu_hours * price
    return Course(step_s, hours, gpu_hours, gpu_hours * gpu.watts / 1000, cost)


def checkpoint_bytes(config: Config) -> dict[str, int]:
    """What a checkpoint takes (fp32 weights and two moments), and a model folder in fp32."""
    count = parameters(config.model)
    return {"checkpoint": 12 * count, "model": 4 * count}
