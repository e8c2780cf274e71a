"""The model under DeepSpeed: one optimizer step, one forward pass. The only importer of deepspeed.

The DeepSpeed dictionary is ds_configs/zeroN.json (or zeroN_cpu.json where no GPU is used), which
says how to partition, plus what the run's configuration says: batch, precision and clipping.
Nothing is written twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn

from astropt_ds.blocks import Block, block_function
from astropt_ds.config import Config
from astropt_ds.data.batch import Batch
from astropt_ds.data.reader import Fault
from astropt_ds.model import AstroPT
from astropt_ds.optim import adamw
from astropt_ds.schedule import lr_factor
from astropt_ds.tokens import standardise
from astropt_ds.training.fragments import Fragment, fragments, refresh, set_optimizer_step
from astropt_ds.training.health import Health
from astropt_ds.training.ranks import Ranks, even_nodes, uses_gpu
from astropt_ds.training.step_clock import Clock, NoClock, StepClock
from astropt_ds.zero import zero_settings


class StepResult(NamedTuple):
    """What one step did.

    Attributes:
        loss: mean over the images of the global batch that could be used, before the update.
        grad_norm: global norm of the gradient, before clipping.
        lr: peak rate times the schedule's factor, as used.
        bad: samples of the global batch that failed.
        updates: optimizer updates made, this one included unless it was skipped.
        faults: those of this rank.
        skipped: why the update was not made, if it was not.
        rule: the key in ``health`` of the rule that it was skipped by.
        in_a_row: updates skipped since the last one that was made.
        stop: whether any rank asked for a stop after this step.
        seconds: of its parts on this rank, where ``run.profile`` asks for them.
    """

    loss: float
    grad_norm: float
    lr: float
    bad: int
    updates: int
    faults: list[Fault]
    skipped: str | None
    rule: str
    in_a_row: int
    stop: bool
    seconds: dict[str, float]


def deepspeed_config(config: Config, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed dictionary of a run. Collective.

    Raises:
        UserError: the global batch cannot be split over the ranks, or the ranks over the nodes.
    """
    micro, accumulation = config.batch.split(ranks.size)
    settings = zero_settings(config.zero, uses_gpu())
    if config.zero.hpz:
        settings["zero_optimization"]["zero_hpz_partition_size"] = even_nodes(ranks.hosts())
    return {
        **settings,
        "train_batch_size": config.batch.global_images,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW rather than DeepSpeed's
        "steps_per_print": 2**31,  # the run's own metrics tell more
    }


@contextmanager
def partitioned(config: Config, ranks: Ranks) -> Iterator[None]:
    """Build the model in here: under ZeRO-3 no rank then ever holds more of it than its part."""
    # On a CPU DeepSpeed would first compile a shared-memory extension, for minutes; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    # DeepSpeed calls collectives by names that newer torch versions deprecate, every step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(verbose=False)
    if config.zero.level < 3:
        yield
        return
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config, ranks)):
        yield


class Engine:
    """A model in training.

    Args:
        model: built inside :func:`partitioned`.
        config: the run's.
        ranks: the run's processes.

    Attributes:
        updates: optimizer updates made so far; the schedule's clock.
    """

    def __init__(self, model: AstroPT, config: Config, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.updates = 0
        self.health = Health(config.health)
        self._loss = 0.0
        self._whole_norm: float | None = None  # where DeepSpeed keeps none
        model.run_blocks_as(block_function(config.recompute, config.compile))
        if config.zero.level < 3:
            model.to(ranks.device)
        else:  # DeepSpeed gathers a block's weights before it runs, not in its midst
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        optimizer = adamw(model, config.optim)
        optimizer.permitted = self._permitted
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, ranks)
        )
        self._clock: Clock = NoClock()
        if config.run.profile:
            self._clock = StepClock(ranks.device, deepspeed.comm.comm.cdb)

    def step(self, batches: Iterable[Batch], stop: bool = False) -> StepResult:
        """One optimizer update on this rank's micro-batches of a global batch. Collective.

        A bad update is skipped, and nothing has moved; whether the run goes on is the caller's.

        Args:
            batches: this rank's share.
            stop: whether this rank wants the run to stop after this step.

        Raises:
            UserError: the data cannot be read on some rank; the update was not made.
        """
        lr = self.config.optim.lr * lr_factor(self.updates, self.config.schedule)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        clock = self._clock
        losses: list[Tensor] = []
        faults: list[Fault] = []
        usable = 0.0
        problem = None
        for batch in batches:
            if losses:  # DeepSpeed counts micro-batches; it updates at the last one's step
                with clock("optimizer"):
                    self.engine.step()
            with clock("data"):
                tokens, weights = self._to_device(batch)
            with clock("forward"):
                _, loss = self.engine(tokens[:, :-1], tokens[:, 1:], weights)
            with clock("backward"):
                self.engine.backward(loss)
            losses.append(loss.detach())
            faults += batch.faults
            usable += float(batch.weights.sum())
            problem = problem or batch.problem
        mean = torch.stack(losses).mean().item() / self.ranks.size
        sums = [mean, usable, len(faults), bool(problem), stop]
        with clock("communication"):
            mean, usable, bad, problems, stops = self.ranks.sum(sums)
        if problems:
            self.ranks.agree(problem)
        # what is optimised has the whole batch as its denominator; what is shown has its good part
        self._loss = mean * (self.config.batch.global_images / usable) if usable else 0.0
        with clock("optimizer"):
            # taken before the step, which clips and then clears the gradients
            self._whole_norm = self._norm_at_stage_0() if self.config.zero.level == 0 else None
            self.engine.step()
            norm = self._norm()
        skipped = self.health.fault(self._loss, norm)
        if skipped:
            self.health.skipped += 1
        else:
            self.health.made(self._loss, norm)
            self.updates += 1
        return StepResult(
            *(self._loss, norm, lr, int(bad), self.updates, faults),
            *(skipped, self.health.rule(self._loss, norm), self.health.skipped, bool(stops)),
            clock.take(),
        )

    def _permitted(self) -> bool:
        """Whether AdamW may go on; DeepSpeed knows the gradient's norm by then."""
        return self.health.fault(self._loss, self._norm()) is None

    def _norm(self) -> float:
        """Of the global gradient, before clipping."""
        if self._whole_norm is not None:
            return self._whole_norm
        # set just before AdamW's step; infinite where DeepSpeed itself calls the update off
        return float(self.engine.optimizer._global_grad_norm)

    @torch.no_grad()
    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions (images, tokens - 1, values) and tokens (images, tokens, values), fp32."""
        tokens, _ = self._to_device(batch)
        self.engine.eval()
        predictions, _ = self.engine(tokens[:, :-1])
        self.engine.train()
        return predictions.float(), tokens

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        patches, weights = batch.to(self.ranks.device)
        return standardise(patches), weights

    def _norm_at_stage_0(self) -> float:
        """The norm that DeepSpeed does not keep where nothing is partitioned."""
        gradients = (p.grad for p in self.engine.module.parameters() if p.grad is not None)
        return float(nn.utils.get_total_norm(gradients))

    # What a checkpoint needs: views of the live state, and the way back from them.

    def fragments(self) -> list[Fragment]:
        """The fp32 weights and AdamW moments that this rank holds, as writable views."""
        return fragments(self.engine)

    def refresh(self) -> None:
        """To be called on all ranks after weights among the fragments were overwritten."""
        refresh(self.engine)

    def state(self) -> dict[str, Any]:
        """What a resume needs besides the fragments, as JSON holds it."""
        return {"updates": self.updates, "health": self.health.state()}

    def restored(self, state: dict[str, Any]) -> None:
        """To be called on all ranks after the fragments were overwritten, with the state saved."""
        self.refresh()
        set_optimizer_step(self.engine, state["updates"])
        self.updates = state["updates"]
        self.health.restore(state["health"])
