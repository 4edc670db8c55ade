"""`Trainer`: everything of an update but the algorithm.

Processes, precision, the optimiser with its schedule and clipping, checkpoints to go on from, metrics and trackers; on accelerate, so
that `accelerate launch` decides on how many cards it runs. An algorithm reads

    for update in trainer.updates(count, name, config):    # goes on after the last checkpoint
        ...                                                 # accumulate a gradient of this process's share
        metrics |= trainer.step(loss)                       # summed over processes, clipped, applied
        trainer.log(metrics)

Each process works on `trainer.mine(batch)`, losses are divided by counts of the whole batch (`trainer.total`), and gradients are
summed once an update: the same step as one process would take on the same batch, however unequal the shares. An update is
accumulated over as many packed rows as its batch needs, so memory is bounded by the row, not by the batch.
"""

import copy
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from swirl_agents.local import LocalPolicy
from swirl_agents.rollout import draw_seed
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from swirl_algos import checkpoints, sharding, tree
from swirl_algos.checkpoints import NothingToLearn, TrainingError
from swirl_algos.configs import TrainerConfig, asks_for_shares, lasting
from swirl_algos.folders import digest, flat
from swirl_env.errors import ConfigError
from swirl_env.io import Writer, write_text

Item = TypeVar("Item")
LayOut = Callable[[Sequence[tree.Tree], int, torch.device], Iterator[tree.Pack]]
DOES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
FLAT_UPDATES = 20
"""Updates from the start without one advantage that is not 0, after which training stops."""
SILENT_UPDATES = 5
"""Updates in a row without a single known score, after which training stops."""


def shuffled_batches(items: Sequence[Item], epochs: int, batch_size: int, seed: int) -> list[list[Item]]:
    """The batches of all epochs, each epoch in an order of its own."""
    order, batches = np.random.default_rng(seed), []
    for _ in range(epochs):
        shuffled = [items[i] for i in order.permutation(len(items))]
        batches += [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    return batches


class Trainer:
    """A model in training.

    Args:
        model: a causal language model; it is changed in place (with `lora_rank`, `trainer.model` is it with adapters).
        tokenizer: its tokenizer.
        config: see `TrainerConfig`.
        folder: where `metrics.jsonl`, `candidates.jsonl` and checkpoints go, and where training goes on from; `None`: nothing is
            written.
        seed: of the order of the data and of every draw.
        log: called in the main process with the metrics of each update.

    Raises:
        ConfigError: LoRA without peft, or a tracker that is not installed.
    """

    def __init__(
        self, model: Any, tokenizer: Any, config: TrainerConfig | None = None, *, folder: Path | None = None, seed: int = 0,
        log: Callable[[dict[str, Any]], None] = lambda metrics: None,
    ):  # fmt: skip
        self.config = config = config or TrainerConfig()
        self.tokenizer, self.folder, self.seed, self._tell = tokenizer, folder, seed, log
        trackers = _trackers(config.tracker) if folder else []
        self.accelerator = Accelerator(
            mixed_precision=config.precision, log_with=trackers or None, project_dir=folder,
            cpu=model.device.type == "cpu" and not asks_for_shares(config),
        )  # fmt: skip
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        if self.accelerator.distributed_type not in DOES:
            raise ConfigError(
                f"accelerate launch asks for {self.accelerator.distributed_type.value}, which this trainer does not do. Use --multi_gpu, or "
                "--use_fsdp where memory is short."
            )
        if self.accelerator.mixed_precision not in ("no", "bf16"):
            raise ConfigError(
                f"accelerate launch asks for {self.accelerator.mixed_precision}, in which small gradients vanish. Use bf16 or no."
            )
        self.sharded = self.world > 1 and asks_for_shares(config)
        self._shared_out = False
        # layers go to their cards when they are shared out: until then a model that no card holds stays where it is
        self.model = _with_adapters(model if self.sharded else model.to(self.accelerator.device), config, seed)
        self._base = checkpoints.base_adapter(self.model)
        self.joins = self._base is None or checkpoints.joins(
            json.loads((self._base / checkpoints.ADAPTER_CONFIG).read_text(encoding="utf-8")),
            self.model.peft_config["default"].to_dict(),
        )
        """Whether a model with adapters is saved as one adapter, whatever it stands on."""
        if self.sharded and not self.joins:
            raise ConfigError(
                f"The adapter in {self._base} is on other layers or of another kind than a new one would be, so both cannot be saved as one "
                "where layers are shared out: merge it (swirl export model) and start there."
            )
        self._layers = [one for one in self.model.modules() if isinstance(one, GradientCheckpointingLayer)]
        if config.gradient_checkpointing and not self._layers:
            raise ConfigError(
                f"The layers of {type(self.model).__name__} cannot be computed again (they are no GradientCheckpointingLayer of transformers): "
                "leave out gradient_checkpointing, and lower row_tokens where memory is short."
            )
        self._fresh = _fresh_adapter(self.model)
        self.kept: dict[str, Any] = {}
        """What an algorithm wants to find again after a restart, as JSON."""
        self.update, self._moved = 0, False
        self._flat, self._silent, self._began = True, 0, time.monotonic()
        self._model = checkpoints.fingerprint(self.model)  # now: layers that were shared out cannot be read
        self._writers: dict[str, Writer] = {}

    # -- what algorithms read

    @cached_property
    def reference(self) -> Any:
        """pi_ref: the checkpoint that training starts from, to be asked for before `updates`. A model whose fresh adapter does nothing
        yet is its own, with the adapter off."""
        assert not (self._moved or self._shared_out), "the weights are no longer those of the start"
        return self.model if self._fresh else copy.deepcopy(self.model).requires_grad_(False).eval()

    def policy(self, temperature: float, max_new_tokens: int) -> LocalPolicy:
        """The model in training, as a policy."""
        return LocalPolicy(
            self.model, self.tokenizer, temperature=temperature, max_new_tokens=max_new_tokens, seed=self.seed
        )

    def mine(self, batch: Sequence[Item]) -> Sequence[Item]:
        """This process's share of a batch."""
        return batch[self.rank :: self.world]

    def total(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes."""
        if self.world == 1:
            return dict(counts)
        sums = torch.tensor(list(counts.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(counts, self.accelerator.reduce(sums, "sum").tolist(), strict=True))

    def autocast(self):
        """The precision of the model's passes."""
        return self.accelerator.autocast()

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The model as a policy, which each process asks as often as it needs."""
        self._share_out()
        self.model.eval()  # also for the gradient: dropout would take that of another policy
        with sharding.whole(self.model):
            yield

    def passes(self, lay_out: LayOut, trees: Sequence[tree.Tree], row_tokens: int) -> Iterator[tuple[tree.Pack, bool]]:
        """(row, whether it counts), one at a time. Where layers are shared out, every process makes as many passes of the same kind, the
        last ones for nothing."""
        packs = lay_out(trees, row_tokens, self.accelerator.device)
        if not self.sharded:
            yield from ((pack, True) for pack in packs)
            return
        own = list(packs)
        missing = max(self.gather([len(own)])) - len(own)
        while own:
            yield own.pop(0), True  # with its masks it is gone when the next one comes
        least = tree.State(np.zeros(1, int), [np.zeros(1, int)])
        for _ in range(missing):
            yield from ((pack, False) for pack in lay_out([[least]], row_tokens, self.accelerator.device))

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Layers compute their activations again on the way back, if that is configured, whatever mode the model is in."""
        layers = self._layers if self.config.gradient_checkpointing else []
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, in the order of the processes."""
        return list(items) if self.world == 1 else gather_object(list(items))

    def record(self, records: Iterable[Any]) -> None:
        """Append to `candidates.jsonl`, in the main process."""
        if self.folder and self.main:
            for record in records:
                self._writer("candidates.jsonl").write(record)

    # -- updates

    def updates(self, count: int, algorithm: str, config: Any, data: Any) -> Iterator[int]:
        """The numbers of the updates that are still to be made.

        Args:
            count: updates in all.
            algorithm: its name.
            config: its settings, a dataclass with `learning_rate` (at its peak).
            data: what is trained on, as JSON; training goes on only with the same.

        Raises:
            TrainingError: the checkpoint in the folder is of another model (its starting weights included) or run.
        """
        facts = {
            "algorithm": algorithm,
            "model": self._model,
            "updates": count,
            "seed": self.seed,
            "data": digest(data),
        }
        facts |= lasting(self.config) | lasting(config)
        self.count, self._moved = count, True
        first, moments = self._resume(facts)
        self._share_out()
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            sharding.groups(self._trained), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=self.config.weight_decay
        )  # fmt: skip
        checkpoints.put_moments(moments, self.model, self.optimizer)
        self._began = time.monotonic()
        try:
            for update in range(first, count):
                spent = self.kept.get("spent", 0.0)
                if spent >= 1:
                    break
                warmup = max(1, round(self.config.warmup * count))
                factor = _factor(self.config.schedule, max(update, spent * count), count, warmup)
                for group in self.optimizer.param_groups:
                    group["lr"] = config.learning_rate * factor
                self.update = update
                # for dropout; all else has draws of its own. From the position, so that no generator's state need be kept
                torch.manual_seed(draw_seed(self.seed, update, self.rank))
                yield update
                every = self.config.save_every
                if self.folder and every and (update + 1) % every == 0 and update + 1 < count:
                    self._save(update + 1, facts)
        finally:
            self.model.eval()
            for writer in self._writers.values():
                writer.close()
            self._writers = {}

    def spend(self, share: float) -> None:
        """So much of a budget is used up with this update; at 1 it is the last one."""
        self.kept["spent"] = share

    def step(self, loss: float) -> dict[str, float]:
        """Apply the gradient that was accumulated in all processes.

        Args:
            loss: this process's share of it.

        Returns:
            `loss` of all, `gradient_norm` before clipping, `learning_rate`.

        Raises:
            TrainingError: the loss or the gradient is not finite; the parameters are left as they were.
        """
        loss = self.total({"loss": loss})["loss"]
        if self.world > 1:
            for parameter in self._trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if not isinstance(parameter, DTensor):  # whose gradient is a sum already
                    parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        alike, own = sharding.squares(gradients)
        norm = math.sqrt(alike + self.total({"squares": own})["squares"]) if self.sharded else math.sqrt(alike)
        sharding.cut_to(gradients, norm, self.config.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"The loss is {loss} and the gradient norm {norm} at update {self.update}: not finite. The last checkpoint is intact. "
                "Begin anew under another name with a lower learning rate."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def check_signal(self, groups: int, known: int, asked: int) -> None:
        """Stop where there is nothing to learn from.

        Args:
            groups: those of this update (of all processes) in which rewards differ.
            known: of the scores that were asked for in this update, those that are known.
            asked: how many were asked for.

        Raises:
            NothingToLearn: no advantage so far was other than 0.
            TrainingError: no score was known in the last updates: the judge has failed.
        """
        self._silent = self._silent + 1 if asked and not known else 0
        if self._silent == SILENT_UPDATES:
            raise TrainingError(
                f"No score was known in the last {SILENT_UPDATES} updates, up to update {self.update}: the judge (or, for an outcome, the "
                "environment) gave none. The last checkpoint is intact: mend it, then give the same command again."
            )
        self._flat = self._flat and not groups
        last = self.update + 1 == self.count or self.kept.get("spent", 0.0) >= 1
        if self._flat and (last or self.update + 1 == FLAT_UPDATES):
            raise NothingToLearn(
                f"All advantages of the first {self.update + 1} updates are 0 or unknown, so there was nothing to learn: the actions "
                "sampled at each state all scored the same. Use a judge that tells them apart, a higher temperature, or a warm start "
                "that now and then succeeds. (Is the judge answering?)"
            )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Keep the metrics of an update: in `metrics.jsonl`, at the trackers, and by the `log` given."""
        if not self.main:
            return
        whole = {"update": self.update, "updates": self.count, **metrics}
        if self.folder:
            self._writer("metrics.jsonl").write(whole | {"seconds": round(time.monotonic() - self._began, 3)})
            numbers = {key: value for key, value in whole.items() if isinstance(value, (int, float))}
            self.accelerator.log(numbers, step=self.update)
        self._tell(whole)

    def save_model(self, folder: Path) -> None:
        """Write the model (or its adapter) whole or not at all; checkpoints are no longer needed then. An adapter on top of another
        becomes one with it, or is merged where that cannot be."""
        weights = self._weights()

        def write(part: Path) -> None:
            model = self.model if self.joins else copy.deepcopy(self.model).merge_and_unload()
            checkpoints.save_model(model, self.tokenizer, part, weights)
            if self._base and self.joins:
                checkpoints.join_adapters(self._base, part)

        if self.main:
            checkpoints.write_folder(folder, write)
            if self.folder:
                shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:  # not end_training(): it ends the group of processes too
            tracker.finish()

    # -- inside

    def _writer(self, name: str) -> Writer:
        assert self.folder is not None
        if name not in self._writers:
            self._writers[name] = Writer(self.folder / name)
        return self._writers[name]

    def _save(self, update: int, facts: Mapping[str, Any]) -> None:
        assert self.folder is not None
        weights, moments = self._weights(), checkpoints.moments(self.model, self.optimizer, self.main)
        if self.main:
            state = {"update": update, **facts, "kept": self.kept, "flat": self._flat}
            checkpoints.save(
                self.folder / "checkpoints", update, self.model, self.tokenizer, weights, moments, json.loads(json.dumps(state))
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def _share_out(self) -> None:
        """Give each process its share of the layers, if that is asked for; `reference` must be there by now."""
        if self.sharded and not self._shared_out:
            self._shared_out = True
            dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None
            reference = vars(self).get("reference", self.model)  # with a fresh adapter it is the model
            for model in [self.model] if reference is self.model else [self.model, reference]:
                sharding.shard(model, self.accelerator.device, self.world, dtype)

    def _weights(self) -> dict[str, torch.Tensor] | None:
        """All of the model, where layers are shared out; to be called in all processes."""
        if not self.sharded:
            return None
        return sharding.gathered(self.model.state_dict(), self.main)

    def _resume(self, facts: Mapping[str, Any]) -> tuple[int, dict[str, torch.Tensor]]:
        """(the first update to make, AdamW's moments)"""
        if self.folder is None:
            return 0, {}
        found = checkpoints.latest(self.folder / "checkpoints")
        first, moments = 0, dict[str, torch.Tensor]()
        if found is not None:
            state, moments = checkpoints.load(found, self.model, json.loads(json.dumps(facts)))
            first, self.kept, self._flat = state["update"], state["kept"], state["flat"]
        shown = {name: value for name, value in flat(facts).items() if isinstance(value, (int, float, str, bool))}
        # what TensorBoard has of later updates is not shown again
        self.accelerator.init_trackers("swirl", shown, {"tensorboard": {"purge_step": first}})
        self.accelerator.wait_for_everyone()
        if self.main:
            for name in ("metrics.jsonl", "candidates.jsonl"):
                cut(self.folder / name, first)
        self.accelerator.wait_for_everyone()
        return first, moments


def cut(path: Path, update: int) -> None:
    """Cut a file of records back to those of the updates before this one."""
    if not path.exists():
        return
    kept = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.endswith("\n") and json.loads(line)["update"] < update:
                kept.append(line)
    write_text(path, "".join(kept))


def _factor(schedule: str, update: float, count: int, warmup: int) -> float:
    """Share of the peak learning rate, after so many of `count` updates."""
    if update < warmup:
        return min(1.0, (update + 1) / warmup)
    left = (count - update) / max(1, count - warmup)
    return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[schedule]


def _trackers(names: str) -> list[str]:
    known = ("tensorboard", "wandb", "trackio")
    if names == "auto":
        return ["tensorboard"] if find_spec("tensorboard") else []
    chosen = [] if names == "none" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise ConfigError(f"tracker is {', '.join(known)}, none or auto; got {name!r}.")
        if not find_spec(name):
            raise ConfigError(f"The tracker {name} is not installed: pip install {name}.")
    return chosen


def _with_adapters(model, config: TrainerConfig, seed: int):
    if not config.lora_rank:
        return model
    if not find_spec("peft"):
        raise ConfigError("lora_rank needs peft: pip install -e '.[lora]' in the project's folder.")
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # the same adapter in each process, and after a restart
        return get_peft_model(
            model,
            LoraConfig(
                r=config.lora_rank, lora_alpha=config.lora_alpha or 2 * config.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )  # fmt: skip


def _fresh_adapter(model) -> bool:
    """Whether a model is one with LoRA adapters that change nothing yet: every B is zero."""
    if not hasattr(model, "disable_adapter"):
        return False
    added = {name: p for name, p in model.named_parameters() if "lora_" in name}
    return any("lora_B" in name for name in added) and not any(p.any() for name, p in added.items() if "lora_B" in name)
