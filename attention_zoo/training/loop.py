"""`Trainer`: one run, from the first step to the last, through kills and restarts.

accelerate moves, wraps and synchronises; timm augments, optimizes, schedules and averages; this file says in which order. A run
that was killed goes on from its last checkpoint as if nothing had happened: on one machine and with `engine.deterministic`, bit
for bit.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from rich.console import Console
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import attention_zoo as az
from attention_zoo import attention as mechanisms
from attention_zoo.swap.core import swaps_of
from attention_zoo.training.checkpoint import Description, Run, build_model, save_weights
from attention_zoo.training.data import input_config, open_images, train_loader, validation_loader
from attention_zoo.training.evaluate import Evaluation, evaluate
from attention_zoo.training.optim import create_optimizer, create_scheduler
from attention_zoo.training.plots import plot_curves
from attention_zoo.training.recipe import Recipe, RecipeError
from attention_zoo.training.report import CsvLog, ProgressReport, TensorBoardLog, read_log

__all__ = ["Stopped", "Trainer", "TrainingDivergedError"]


class TrainingDivergedError(RuntimeError):
    """The loss is no longer a finite number."""


class Stopped(Exception):
    """A signal ended the run early, after it had saved itself; `checkpoint` is where it goes on."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; go on with --resume auto (from {checkpoint})")
        self.signum, self.checkpoint = signum, checkpoint


class Trainer:
    """Everything of a run that a recipe decides. `Trainer(recipe).fit()` runs it.

    Args:
        recipe: what to do.
        resume: None: start anew; "auto": go on from the run's newest checkpoint, if there is one; a path: go on from there.
        console: where progress goes.

    Raises:
        RecipeError, UnknownNameError, ValueError: a recipe that does not go together.
        FileNotFoundError: data or checkpoint that are not there.
        FileExistsError: the run's folder holds checkpoints and `resume` is None.
    """

    def __init__(self, recipe: Recipe, *, resume: str | Path | None = None, console: Console | None = None) -> None:
        self.recipe, self.console = recipe, console if console is not None else Console(highlight=False, soft_wrap=True)
        self.run = Run(Path(recipe.output.root) / (recipe.output.name or "run"), recipe.output.keep)
        start_from = self._find_start(resume)
        engine = recipe.engine
        self.accelerator = Accelerator(
            cpu=engine.cpu, mixed_precision=engine.mixed_precision, gradient_accumulation_steps=engine.accumulate
        )
        self.fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        if self.fsdp and recipe.ema.decay is not None:
            raise RecipeError("ema needs the whole weights on every device, FSDP shards them: set ema.decay=null")
        self._make_repeatable()
        self._open_data()
        self._build()
        self.epoch = self.step_in_epoch = self.step = 0
        self.best_top1, self.sums = -1.0, [0.0, 0.0, 0.0]
        self.first: Evaluation | None = None
        self.last: Evaluation | None = None
        self._stop_signal = 0
        restored = self._load_weights(start_from) if start_from is not None else None
        self._prepare()
        self._seed(engine.seed)
        if restored is not None:
            self._restore(restored)
            self._say(f"going on from {start_from}: epoch {self.epoch + 1}, update {self.step_in_epoch}")

    def fit(self) -> Evaluation:
        """Run to the end; returns the last validation.

        Raises:
            Stopped: after SIGTERM or SIGINT, once the update is finished and saved.
            TrainingDivergedError: the loss is not finite.
        """
        recipe, main = self.recipe, self.accelerator.is_main_process
        self._describe()
        self.csv = CsvLog(self.run.folder / "log.csv", first_epoch=self.epoch)
        boards = TensorBoardLog(
            self.run.folder / "tensorboard", enabled=main and recipe.output.tensorboard, purge_step=self.step if self.step else None
        )
        self.board = boards
        report = ProgressReport(self.console, enabled=main, epochs=recipe.schedule.epochs, updates_per_epoch=self.updates_per_epoch)
        with self._signals(), report as self.progress:
            if recipe.output.validate_first and self.step == 0:
                self._validate_first()
            while self.epoch < recipe.schedule.epochs:
                self._train_epoch()
                self._finish_epoch()
            if self.last is None:  # the run was over before it was resumed
                self.last = self._validate()
        boards.close()
        self._finish()
        return self.last

    def measure(self) -> Evaluation:
        """Validate the model as it stands."""
        return self._validate()

    # --- building -------------------------------------------------------------------------------------------------------------

    def _find_start(self, resume: str | Path | None) -> Path | None:
        found = self.run.checkpoints()
        if resume is None:
            if found:
                raise FileExistsError(
                    f"{self.run.folder} holds the checkpoints of a run: go on with --resume auto, or take another output.name"
                )
            return None
        if str(resume) == "auto":
            return found[-1] if found else None
        if not Path(resume).is_dir():
            raise FileNotFoundError(f"no checkpoint at {resume}" + (f"; there are {', '.join(map(str, found))}" if found else ""))
        return Path(resume)

    def _make_repeatable(self) -> None:
        if self.recipe.engine.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not self.recipe.engine.deterministic
        torch.manual_seed(self.recipe.engine.seed)  # the initial weights, equal on every device

    def _open_data(self) -> None:
        data = self.recipe.data
        with self.accelerator.main_process_first():  # one process downloads
            self.train_images = open_images(data, data.train_split)
        self.class_names = self.train_images.class_names
        self.val_images = open_images(data, data.val_split, class_names=self.class_names)

    def _build(self) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        self.module = build_model(recipe.model, len(self.class_names))
        kwargs = recipe.model.kwargs
        self.input = input_config(self.module, recipe.data, img_size=kwargs.get("img_size"), in_chans=kwargs.get("in_chans"))
        if recipe.engine.grad_checkpointing:
            self.module.set_grad_checkpointing(True)
        if recipe.engine.channels_last:
            self.module.to(memory_format=torch.channels_last)
        self.module.to(accelerator.device)
        self.ema = None
        if recipe.ema.decay is not None:
            self.ema = ModelEmaV3(self.module, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup)
        rank, world = accelerator.process_index, accelerator.num_processes
        self.loader, self.batches = train_loader(
            self.train_images,
            self.input,
            recipe.data,
            recipe.augment,
            seed=recipe.engine.seed,
            rank=rank,
            world_size=world,
            accumulate=recipe.engine.accumulate,
        )
        self.val_loader = validation_loader(self.val_images, self.input, recipe.data, rank=rank, world_size=world)
        self.updates_per_epoch = len(self.loader) // recipe.engine.accumulate
        self.images_per_update = recipe.data.batch_size * world * recipe.engine.accumulate
        self.mixup, self.criterion = self._loss()

    def _loss(self) -> tuple[Mixup | None, Callable[[Tensor, Tensor], Tensor]]:
        augment, smoothing = self.recipe.augment, self.recipe.loss.label_smoothing
        if augment.mixup > 0 or augment.cutmix > 0:
            mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mixup_prob,
                switch_prob=augment.mixup_switch_prob,
                label_smoothing=smoothing,
                num_classes=len(self.class_names),
            )
            return mixup, SoftTargetCrossEntropy()
        return None, LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()

    def _prepare(self) -> None:
        recipe = self.recipe
        if recipe.engine.compile:
            self.module.compile()  # in place: the names of the weights stay
        optimizer = create_optimizer(self.module, recipe.optimizer, self.images_per_update)
        self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        self.scheduler = create_scheduler(
            self.optimizer,
            recipe.schedule,
            recipe.optimizer,
            images_per_update=self.images_per_update,
            updates_per_epoch=self.updates_per_epoch,
        )

    def _seed(self, seed: int) -> None:
        """Random numbers of training (dropout, Mixup, ...), different on each device."""
        seeds = np.random.SeedSequence((seed, self.accelerator.process_index)).generate_state(3)
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        torch.manual_seed(int(seeds[2]))

    # --- training -------------------------------------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        self.model.train()
        self.batches.start(self.epoch, self.step_in_epoch * recipe.engine.accumulate)
        self.epoch_started, self.first_step = time.perf_counter(), self.step_in_epoch
        sums = torch.tensor(self.sums, device=accelerator.device)  # loss, auxiliary loss, batches
        for images, labels in self.loader:
            loss, aux = self._step(images, labels)
            sums += torch.stack([loss, aux, torch.ones_like(loss)])
            if not accelerator.sync_gradients:
                continue
            self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
            self._log_update(sums)
            last = self.step_in_epoch == self.updates_per_epoch
            every = recipe.output.checkpoint_every
            if (stop := self._asked_to_stop()) or (every and self.step % every == 0 and not last):
                self.sums = sums.tolist()
                checkpoint = self.save()
                if stop:
                    raise Stopped(stop, checkpoint)
        self.sums = accelerator.reduce(sums, "sum").tolist()

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One batch forward and backward, and the update when it is due. Returns the detached loss and auxiliary loss."""
        recipe, accelerator = self.recipe, self.accelerator
        images, labels = (t.to(accelerator.device, non_blocking=True) for t in (images, labels))
        if recipe.engine.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        mechanisms.set_training_step(self.module, self.step_in_epoch)
        with accelerator.accumulate(self.model):
            with accelerator.autocast():
                logits = self.model(images)
            loss = self.criterion(logits.float(), labels)
            aux = az.auxiliary_loss(self.module) if recipe.loss.aux_weight else torch.zeros_like(loss)
            accelerator.backward(loss + recipe.loss.aux_weight * aux)
            if accelerator.sync_gradients and recipe.optimizer.clip_grad is not None:
                accelerator.clip_grad_norm_(self.model.parameters(), recipe.optimizer.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.scheduler.step_update(self.step + 1)
            if self.ema is not None:
                self.ema.update(self.module, step=self.step + 1)
        return loss.detach(), aux.detach()

    def _log_update(self, sums: Tensor) -> None:
        """Every `log_every` updates: the mean loss of the epoch so far, to the screen and TensorBoard."""
        known = None
        if self.step % self.recipe.output.log_every == 0:
            loss, aux, batches = sums.tolist()
            known = loss / batches
            if not math.isfinite(known + aux):
                raise TrainingDivergedError(
                    f"the loss is {known} (auxiliary: {aux / batches}) at update {self.step}; a lower optimizer.lr, more "
                    "warm-up or optimizer.clip_grad may help; the checkpoints before it are whole"
                )
            self.board.add(self.step, train__loss=known, train__aux_loss=aux / batches, train__lr=self._lr())
        self.progress.update(self.epoch, self.step_in_epoch, known)

    def _finish_epoch(self) -> None:
        """Validate, write the row of the epoch, save."""
        recipe = self.recipe
        seconds = time.perf_counter() - self.epoch_started
        images = (self.step_in_epoch - self.first_step) * self.images_per_update
        due = (self.epoch + 1) % recipe.output.validate_every == 0 or self.epoch + 1 == recipe.schedule.epochs
        self.last = self._validate() if due else self.last
        loss, aux, batches = self.sums
        row: dict[str, float | None] = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self._lr(),
            "train_loss": loss / batches,
            "aux_loss": aux / batches,
            "images_per_second": images / seconds,
            "seconds": seconds,
        }
        if due and self.last is not None:
            row.update({f"val_{k}": v for k, v in self.last.metrics().items()})
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, [0.0, 0.0, 0.0]
        if self.accelerator.is_main_process:
            self.csv.add(row)
            self.board.add(self.step, **{f"epoch__{k}": v for k, v in row.items() if k not in ("epoch", "step")})
        self._report_epoch(row)
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss of epoch {self.epoch} is {loss / batches}; its checkpoint was not written")
        better = due and self.last is not None and self.last.top1 > self.best_top1
        if better and self.last is not None:
            self.best_top1 = self.last.top1
        weights = self._weights()
        if better and self.accelerator.is_main_process:
            save_weights(self.run.folder / "best.safetensors", weights.get("ema", weights["model"]), self.description())
        checkpoint = self.save(weights)
        if (stop := self._asked_to_stop(now=True)) and self.epoch < recipe.schedule.epochs:
            raise Stopped(stop, checkpoint)

    def _validate_first(self) -> None:
        """What the run starts from: kept as `first`, said on the screen and in TensorBoard."""
        self.first = self._validate()
        metrics = self.first.metrics()
        if self.accelerator.is_main_process:
            self.board.add(0, **{f"epoch__val_{k}": v for k, v in metrics.items()})
        self.progress.line(f"before the first update  validation loss {metrics['loss']:.4f}  top-1 {metrics['top1']:.2f} %")

    def _report_epoch(self, row: Mapping[str, float | None]) -> None:
        text = f"epoch {self.epoch}/{self.recipe.schedule.epochs}  train loss {row['train_loss']:.4f}"
        if row["aux_loss"]:
            text += f"  aux {row['aux_loss']:.4f}"
        if row.get("val_top1") is not None:
            text += f"  validation loss {row['val_loss']:.4f}  top-1 {row['val_top1']:.2f} %"
        self.progress.line(f"{text}  ({row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s)")

    def _validate(self) -> Evaluation:
        """The average of the weights where there is one, else the weights."""
        model = self.ema.module if self.ema is not None else self.model if self.fsdp else self.module
        return evaluate(
            model,
            self.val_loader,
            len(self.class_names),
            device=self.accelerator.device,
            accelerator=self.accelerator,
            channels_last=self.recipe.engine.channels_last,
        )

    def _lr(self) -> float:
        """The largest learning rate of the groups: the one that `lr_multipliers` and layer decay leave alone."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    # --- saving and restoring -------------------------------------------------------------------------------------------------

    def description(self) -> Description:
        """What the run's weights files say about themselves."""
        model = self.recipe.model
        root = self.recipe.data.root
        data = replace(self.recipe.data, root=None if root is None else str(Path(root).expanduser().absolute()))
        return Description(
            model=model.name,
            attention=model.attention,
            attention_kwargs=model.attention_kwargs,
            kwargs={**model.kwargs, "num_classes": len(self.class_names)},
            zoo_swap=swaps_of(self.module),
            class_names=self.class_names,
            input=self.input.to_dict(),
            data=asdict(data),
            epoch=self.epoch,
            step=self.step,
            metrics=self.last.metrics() if self.last is not None else {},
        )

    def save(self, weights: dict[str, dict[str, Tensor]] | None = None) -> Path:
        """Write a checkpoint (called on every device); returns its folder."""
        weights = self._weights() if weights is None else weights
        optimizer = self._optimizer_state()
        scaler = getattr(self.accelerator, "scaler", None)
        generators = gather_object([_random_states()])
        checkpoint = self.run.folder
        if self.accelerator.is_main_process:
            state = {
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "step": self.step,
                "updates_per_epoch": self.updates_per_epoch,
                "sums": self.sums,
                "best_top1": self.best_top1,
                "optimizer": optimizer,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "random": generators,
                "recipe": self.recipe.to_dict(),
            }
            checkpoint = self.run.save(self.step, weights, self.description(), state)
        self.accelerator.wait_for_everyone()
        return checkpoint

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """Whole state dicts by file stem; under FSDP gathered, on the first device only."""
        weights = {"model": self.accelerator.get_state_dict(self.model) if self.fsdp else self.module.state_dict()}
        return weights if self.ema is None else {**weights, "ema": self.ema.module.state_dict()}

    def _optimizer_state(self) -> dict[str, Any]:
        if not self.fsdp:
            return self.optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)

    def _load_weights(self, checkpoint: Path) -> dict[str, Any]:
        """Weights before accelerate wraps the model, so that they are whole; returns the rest of the state."""
        weights, state = self.run.load(checkpoint)
        if ("ema" in weights) != (self.ema is not None):
            how = "with" if "ema" in weights else "without"
            raise RecipeError(f"{checkpoint} was saved {how} an average of the weights: see ema.decay")
        if state["updates_per_epoch"] != self.updates_per_epoch and state["step_in_epoch"]:
            raise RecipeError(
                f"{checkpoint} stands within an epoch of {state['updates_per_epoch']} updates, now an epoch has "
                f"{self.updates_per_epoch}: keep the data, batch size, accumulation and number of devices"
            )
        for target, stem in ((self.module, "model"), (self.ema.module if self.ema is not None else None, "ema")):
            if target is not None:
                try:
                    target.load_state_dict(weights[stem])
                except (RuntimeError, KeyError) as error:
                    raise RecipeError(f"{checkpoint} is of another model than the recipe's: {error}") from None
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        """What `save` wrote beside the weights. The schedule is a function of the step."""
        self.epoch, self.step_in_epoch, self.step = state["epoch"], state["step_in_epoch"], state["step"]
        self.best_top1, self.sums = state["best_top1"], state["sums"]
        if self.fsdp:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, self.optimizer.optimizer, state["optimizer"], options=options)
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.step_update(self.step)
        if state["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if len(state["random"]) == self.accelerator.num_processes:
            _set_random_states(state["random"][self.accelerator.process_index])
        else:
            self._say("another number of devices than before: dropout and Mixup draw new random numbers")
            self._seed(self.recipe.engine.seed + self.step)
        changed = _differences(state["recipe"], self.recipe.to_dict())
        if changed:
            self._say(f"the recipe has changed since the checkpoint: {', '.join(changed)}")

    def _describe(self) -> None:
        """Write recipe.yaml and say what is about to run."""
        if not self.accelerator.is_main_process:
            return
        self.run.folder.mkdir(parents=True, exist_ok=True)
        (self.run.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe.to_dict(), sort_keys=False), encoding="utf-8")
        model, data = self.recipe.model, self.recipe.data
        parameters = sum(p.numel() for p in self.module.parameters()) / 1e6
        swapped = ", ".join(dict.fromkeys(entry["mechanism"] for entry in swaps_of(self.module)))
        self._say(
            f"{model.name}{f' with {model.attention}' if model.attention else ''}"
            f"{f', swapped to {swapped}' if swapped else ''}, {parameters:.2f} M parameters; "
            f"{data.name}: {len(self.train_images)} images of {len(self.class_names)} classes, {len(self.val_images)} held out; "
            f"{self.updates_per_epoch} updates of {self.images_per_update} images per epoch; "
            f"{self.accelerator.num_processes} x {self.accelerator.device.type}"
        )

    def _finish(self) -> None:
        """The weights to use and the picture of the run."""
        weights = self._weights()
        if self.accelerator.is_main_process:
            save_weights(self.run.folder / "model.safetensors", weights.get("ema", weights["model"]), self.description())
            title = f"{self.run.folder.name}: {self.recipe.model.name} on {self.recipe.data.name}"
            plot_curves(read_log(self.run.folder / "log.csv"), self.run.folder / "curves.png", title=title)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    # --- signals --------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT asks to stop after the update, a second one stops at once."""

        def ask(signum: int, _frame: object) -> None:
            self._stop_signal = signum
            signal.signal(signum, before[signum])

        before: dict[int, Any] = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for signum in before:
            signal.signal(signum, ask)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _asked_to_stop(self, *, now: bool = False) -> int:
        """The signal that came, on any device; 0: none. Several devices agree on it every tenth update, or `now`."""
        if self.accelerator.num_processes == 1:
            return self._stop_signal
        if not now and self.step % 10:
            return 0
        asked = torch.tensor([self._stop_signal], device=self.accelerator.device)
        return signal.SIGTERM if int(self.accelerator.reduce(asked, "sum")) else 0

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(text, markup=False)


def _random_states() -> dict[str, Any]:
    """The states of all global generators, as what `weights_only=True` reads."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    algorithm, keys, *rest = states["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ, as "key: old -> new"; what is written where does not count."""
    return [
        f"{section}.{key}: {old.get(section, {}).get(key)} -> {value}"
        for section, keys in new.items()
        if section != "output"
        for key, value in keys.items()
        if old.get(section, {}).get(key) != value
    ]
