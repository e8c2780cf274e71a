"""A run: its folder, its counters, and what it records, shows, saves and resumes from."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from astropt_ds.config import Config
from astropt_ds.data.loader import Galaxies
from astropt_ds.data.reader import Fault
from astropt_ds.errors import UserError
from astropt_ds.flops import mfu, training_flops
from astropt_ds.training import checkpoint
from astropt_ds.training.bad_samples import BadSamples
from astropt_ds.training.engine import Engine, StepResult
from astropt_ds.training.environment import attention_kernel, environment
from astropt_ds.training.metrics import METRICS, Metrics, read_metrics
from astropt_ds.training.progress import Progress
from astropt_ds.training.ranks import Ranks
from astropt_ds.training.samples import reconstruction_picture
from astropt_ds.training.validation import Validation

COMPLETE = "complete"
SHARDS = "shards"


class Run:
    """The state of a run outside the engine; all ranks have one, rank 0 writes.

    Args:
        config: the run's.
        galaxies: its data.
        ranks: its processes.

    Attributes:
        step: batches consumed.

    Raises:
        UserError: the folder is not named, not writable, or holds a run that may not be resumed.
    """

    def __init__(self, config: Config, galaxies: Galaxies, ranks: Ranks) -> None:
        self.config, self.galaxies, self.ranks = config, galaxies, ranks
        self.step = 0
        self.bad = BadSamples(config, galaxies.shard_samples)
        self._clock = time.monotonic()
        self._validated = False
        if config.run.dir is None:
            raise UserError("run.dir is missing: a folder for the run, for example run.dir=runs/1m")
        self.dir = Path(config.run.dir)
        with ranks.together():
            if ranks.main:
                self._check_folder()
        self.metrics: Metrics | None = None
        self.progress: Progress | None = None

    # The course of a run.

    def resume(self, engine: Engine) -> None:
        """Load the checkpoint that run.resume names, if any, and open the records. Collective.

        Raises:
            UserError: a resume was asked for and nothing fits.
        """
        wanted = self.config.run.resume
        source = self.dir if wanted == "auto" else Path(wanted)
        found: Path | None = None
        passed_over: list[str] = []
        if wanted != "never":
            found, passed_over = checkpoint.find(source, self.ranks)
        if found is None and (passed_over or wanted not in ("auto", "never")):
            raise UserError(
                f"run.resume={wanted}: no checkpoint verifies below {source}"
                + "".join(f"; {line}" for line in passed_over)
            )
        if found is not None and wanted != "auto":
            self._check_no_newer(found)
        if found is not None:
            self._load(found, engine)
        with self.ranks.together():
            if self.ranks.main:
                self._open_records()
        for line in passed_over:
            self.event("checkpoint_passed_over", f"passed over {line}")
        self.event("start", self._start_line(found))
        for warning in self.galaxies.warnings:
            self.event("data", f"warning: {warning}")
        if self.config.run.steps <= self.config.schedule.warmup:
            warmup = self.config.schedule.warmup
            self.event("schedule", f"warning: the run ends within schedule.warmup={warmup} updates")
        self._clock = time.monotonic()

    def record_step(self, result: StepResult) -> None:
        """Count and record a step. Collective where samples failed.

        Raises:
            UserError: too many samples failed.
        """
        self.step += 1
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        images = self.config.batch.global_images
        self.bad.count += result.bad
        if self.ranks.main:
            assert self.metrics and self.progress
            rate = images * self.config.tokens_per_image / seconds
            self.metrics.write(
                "train",
                self.step,
                updates=result.updates,
                **self._counters(),
                loss=result.loss,
                lr=result.lr,
                grad_norm=result.grad_norm,
                skipped=0,  # a loss or gradient that is not finite stops the run
                tokens_per_s=rate,
                mfu=self._mfu(rate),
                data_wait_s=self.galaxies.waited,
                memory_bytes=self._memory(),
                bad_samples=self.bad.count,
                **({"drawn": drawn} if (drawn := self.galaxies.drawn(self.step * images)) else {}),
            )
            self.progress.update(self.step, result.loss, result.lr, images, seconds)
        self.galaxies.waited = 0.0
        if result.bad:
            self.bad.add(self._report("bad_sample", result.faults), self.step)

    def record_validation(self, validation: Validation) -> None:
        """Record a validation, its failures and its picture. Collective."""
        if not self._validated:  # the set is fixed: its faults are told once
            self._report("bad_validation_sample", validation.faults)
        self._validated = True
        if self.ranks.main:
            assert self.metrics and self.progress
            scores = {"loss": validation.loss, "n": validation.n}
            baselines = {"loss_zeros": validation.zeros, "loss_previous": validation.previous}
            self.metrics.write("val", self.step, **self._counters(), **scores, **baselines)
            self.progress.say(
                f"step {self.step}: validation loss {validation.loss:.4f} on {validation.n} images "
                f"(zeros {validation.zeros:.4f}, previous patch {validation.previous:.4f})"
            )
            if len(validation.patches):
                picture = reconstruction_picture(
                    validation.patches, validation.predictions, self.galaxies.grid
                )
                picture.save(self.dir / "samples" / f"step-{self.step:08d}.png")
        self._clock = time.monotonic()

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the last, happens now."""
        return self.step % every == 0 or self.step == self.config.run.steps

    def save(self, engine: Engine) -> None:
        """Write a checkpoint. Collective."""
        start = time.monotonic()
        state = {
            "updates": engine.updates,
            "bad_samples": self.bad.count,
            "identity": self._identity(),
            "config": self.config.model_dump(mode="json"),
        }
        path = checkpoint.save(self.dir, self.step, engine.fragments(), state, self.ranks)
        seconds = time.monotonic() - start
        self.event("checkpoint", f"saved {path} in {seconds:.1f} s")
        self._clock = time.monotonic()

    def finish(self) -> None:
        """Say how the whole run went, also in the file ``complete``, and close the records.

        Raises:
            UserError: too many samples failed.
        """
        self.bad.check(self.step)
        if self.ranks.main:
            assert self.metrics and self.progress
            found = [r for r in read_metrics(self.dir) if r["kind"] == "val"]
            losses = [r["loss"] for r in found if r["n"] == found[-1]["n"]]  # on the same set
            course = f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "not taken here"
            text = (
                f"complete at step {self.step}: validation loss {course}; "
                f"pictures in {self.dir / 'samples'}"
            )
            self.event("finish", text)
            (self.dir / COMPLETE).write_text(text + "\n")
            self.progress.close()
            self.metrics.close()

    def event(self, name: str, text: str, **values: Any) -> None:
        """Record and show that something happened; on rank 0."""
        if self.ranks.main:
            assert self.metrics and self.progress
            self.metrics.write("event", self.step, event=name, text=text, **values)
            self.progress.say(text)

    def _report(self, event: str, faults: list[Fault]) -> list[Fault]:
        """Record the faults of all ranks, and return them. Collective."""
        everywhere = [fault for faults in self.ranks.gather(faults) for fault in faults]
        for fault in everywhere:
            text = f"bad sample {fault.shard} {fault.key}: {fault.reason}"
            self.event(event, text, shard=fault.shard, key=fault.key)
        return everywhere

    # What a run knows about itself.

    def _counters(self) -> dict[str, int]:
        samples = self.step * self.config.batch.global_images
        tokens = self.config.tokens_per_image
        return {
            "samples": samples,
            "tokens": samples * tokens,
            "flops": samples * training_flops(self.config.model, tokens),
        }

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote the checkpoint."""
        model = self.config.model.architecture()
        return {
            **{f"model.{key}": value for key, value in model.items()},
            "seed": self.config.seed,
            "batch.global_images": self.config.batch.global_images,
            "data.image_size": self.config.data.image_size,
            "data.window": self.config.data.window,
            "data.augment": self.config.data.augment,
            SHARDS: self.galaxies.hash,
        }

    def _load(self, path: Path, engine: Engine) -> None:
        with self.ranks.together():
            state = checkpoint.read_manifest(path)["state"]
            for key, now in self._identity().items():
                then = state["identity"].get(key)
                if then != now and key == SHARDS:
                    raise UserError(
                        f"{path} was made from other images, sources or weights than "
                        "data.path or data.sources name now: keep those, or name another run.dir"
                    )
                if then != now:
                    raise UserError(
                        f"{path} was made with {key}={then}; this run has {now}: keep the old "
                        "value, or name another run.dir"
                    )
            manifest = checkpoint.load(path, engine.fragments())
        engine.restored(state["updates"])
        self.step = manifest["step"]
        self.bad.count = state["bad_samples"]

    def _check_no_newer(self, found: Path) -> None:
        """Going back in a folder would leave two branches of one run in it."""
        step = checkpoint.read_manifest(found)["step"]
        newer = [p for p in checkpoint.candidates(self.dir) if p.name > f"step-{step:08d}"]
        if newer:
            raise UserError(
                f"run.resume={found}: run.dir={self.dir} holds the newer {newer[0].name}; "
                "name another run.dir"
            )

    def _check_folder(self) -> None:
        if self.config.run.resume == "never" and (self.dir / METRICS).exists():
            raise UserError(
                f"run.dir={self.dir}: holds a run already and run.resume=never; "
                "name another folder, or run.resume=auto"
            )
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir={self.dir}: no folder can be made there ({error})") from None

    def _open_records(self) -> None:
        """Only once the run is known to go on: a refused one leaves the folder as it was."""
        (self.dir / "samples").mkdir(exist_ok=True)
        if self.step < self.config.run.steps:  # else nothing runs that they would describe
            (self.dir / COMPLETE).unlink(missing_ok=True)
            (self.dir / "config.yaml").write_text(self.config.to_yaml())
            facts = json.dumps(environment(self.config, self.ranks), indent=1)
            (self.dir / "environment.json").write_text(facts + "\n")
        self.metrics = Metrics(self.dir, self.step, self.config)
        steps, tokens = self.config.run.steps, self.config.tokens_per_image
        self.progress = Progress(self.step, steps, tokens)

    def _start_line(self, found: Path | None) -> str:
        micro, accumulation = self.config.batch.split(self.ranks.size)
        begins = f"resuming {found}" if found else "starting"
        kernel = attention_kernel(self.config, self.ranks)
        return (
            f"{begins} at step {self.step} of "
            f"{self.config.run.steps}: {self.ranks.size} x {self.ranks.device_name}, ZeRO-"
            f"{self.config.zero.stage}, {self.config.precision}, attention {kernel}, "
            f"global batch {self.config.batch.global_images} = {self.ranks.size} ranks x "
            f"{micro} images x {accumulation} accumulation"
        )

    def _mfu(self, tokens_per_second: float) -> float | None:
        tokens = self.config.tokens_per_image
        name, devices = self.ranks.device_name, self.ranks.size
        return mfu(self.config.model, tokens, tokens_per_second, name, devices)

    def _memory(self) -> int:
        """Peak bytes: of the device, or of this process where the device is the processor."""
        if self.ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
