"""The model under DeepSpeed: one optimizer step, one forward pass. The only importer of deepspeed.

The DeepSpeed dictionary is ds_configs/zeroN.json, which says how to partition, plus what the
run's configuration says: batch, precision and clipping. Nothing is written twice.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch import Tensor, nn

from astropt_ds.config import Config
from astropt_ds.data.batch import Batch
from astropt_ds.data.reader import Fault
from astropt_ds.errors import UserError
from astropt_ds.optim import adamw
from astropt_ds.schedule import lr_factor
from astropt_ds.tokens import standardise
from astropt_ds.training.fragments import (
    Fragment,
    fragments,
    refresh,
    set_optimizer_step,
)
from astropt_ds.training.ranks import Ranks

DS_CONFIGS = Path(__file__).parent.parent / "ds_configs"


class StepResult(NamedTuple):
    """What one step did.

    Attributes:
        loss: mean over the images of the global batch that could be used, before the update.
        grad_norm: global norm of the gradient, before clipping.
        lr: peak rate times the schedule's factor, as used.
        bad: samples of the global batch that failed.
        updates: optimizer updates made, this one included.
        faults: those of this rank.
    """

    loss: float
    grad_norm: float
    lr: float
    bad: int
    updates: int
    faults: list[Fault]


def deepspeed_config(config: Config, ranks: int) -> dict[str, Any]:
    """The DeepSpeed dictionary of a run.

    Raises:
        UserError: the global batch cannot be split over the ranks.
    """
    micro, accumulation = config.batch.split(ranks)
    name = f"zero{config.zero.stage}" + ("_offload" if config.zero.offload else "")
    return {
        **json.loads((DS_CONFIGS / f"{name}.json").read_text()),
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
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls collectives by names that newer torch versions deprecate, every step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(verbose=False)
    if config.zero.stage < 3:
        yield
        return
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config, ranks.size)):
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

    def __init__(self, model: nn.Module, config: Config, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.updates = 0
        if config.zero.stage < 3:
            model.to(ranks.device)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(model, config.optim),
            config=deepspeed_config(config, ranks.size),
        )

    def step(self, batches: Iterable[Batch]) -> StepResult:
        """One optimizer update on this rank's micro-batches of a global batch.

        Raises:
            UserError: the data cannot be read on some rank, or the loss or the gradient is not
                finite; the update was not made.
        """
        lr = self.config.optim.lr * lr_factor(self.updates, self.config.schedule)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        losses: list[Tensor] = []
        faults: list[Fault] = []
        usable = 0.0
        problem = None
        for batch in batches:
            if losses:  # DeepSpeed counts micro-batches; it updates at the last one's step
                self.engine.step()
            tokens, weights = self._to_device(batch)
            _, loss = self.engine(tokens[:, :-1], tokens[:, 1:], weights)
            self.engine.backward(loss)
            losses.append(loss.detach())
            faults += batch.faults
            usable += float(batch.weights.sum())
            problem = problem or batch.problem
        mean = torch.stack(losses).mean().item() / self.ranks.size
        mean, usable, bad, stop = self.ranks.sum([mean, usable, len(faults), bool(problem)])
        if stop:
            self.ranks.agree(problem)
        # what is optimised has the whole batch as its denominator; what is shown has its good part
        loss = mean * (self.config.batch.global_images / usable) if usable else 0.0
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} before update {self.updates + 1}")
        # taken before the step, which clips and then clears the gradients
        norm = self._norm_at_stage_0() if self.config.zero.stage == 0 else None
        if norm is None or norm.isfinite():
            self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        # at stages 1 to 3 DeepSpeed skips an update with an infinite gradient without a word
        if norm is None or not math.isfinite(norm) or not self.engine.was_step_applied():
            raise UserError(f"the gradient is not finite at update {self.updates + 1}")
        self.updates += 1
        return StepResult(loss, float(norm), lr, int(bad), self.updates, faults)

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

    def _norm_at_stage_0(self) -> Tensor:
        """The norm that DeepSpeed does not keep where nothing is partitioned."""
        gradients = (p.grad for p in self.engine.module.parameters() if p.grad is not None)
        return nn.utils.get_total_norm(gradients)

    # What a checkpoint needs: views of the live state, and the way back from them.

    def fragments(self) -> list[Fragment]:
        """The fp32 weights and AdamW moments that this rank holds, as writable views."""
        return fragments(self.engine)

    def restored(self, updates: int) -> None:
        """To be called on all ranks after the fragments were overwritten."""
        refresh(self.engine)
        set_optimizer_step(self.engine, updates)
        self.updates = updates
