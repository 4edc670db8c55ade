"""Checkpoints: a model folder that anything may load, and beside it what is needed to go on exactly from there.

    update-000020/
      config.json, model.safetensors, tokenizer ...     (LoRA: adapter_config.json, adapter_model.safetensors)
      optimizer.safetensors                             AdamW's moments by parameter name
      trainer.json                                      the next update, what the run is, what the algorithm keeps

Random generators are seeded anew at each update from (seed, update, process), so their state need not be kept.
Safetensors and JSON only: loading runs no code. A folder gets its name when it is whole, and the one before it is removed only
then, so a process that is killed, or a full disk, leaves the last good one.
"""

import errno
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from swirl_algos.folders import complete
from swirl_algos.sharding import gathered, shared_out
from swirl_env.errors import SwirlError

OPTIMIZER, STATE = "optimizer.safetensors", "trainer.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class TrainingError(SwirlError, RuntimeError):
    """Training cannot go on; what was saved before is intact."""


class NothingToLearn(TrainingError):
    """No reward set an action apart from its siblings."""


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Make a folder whole or not at all. Raises `TrainingError` where it cannot be written, and leaves nothing behind."""
    if folder.exists() and not complete(folder):
        raise TrainingError(f"{folder} exists and is no model: it is not replaced. Give another name.")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        write(part)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        shutil.rmtree(part, ignore_errors=True)
        full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise TrainingError(
            f"{folder} could not be written: {error}. The last good checkpoint is intact; {'make room' if full else 'mend that'} and give "
            "the same command again."
        ) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder of them."""
    found = [path for path in folder.glob("update-*") if path.suffix != ".part" and (path / STATE).exists()]
    return max(found, default=None)


def fingerprint(model) -> dict[str, Any]:
    """What tells one model from another: its family, the shapes of its trained parameters, and some of all its weights."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    some = b"".join(p.detach().flatten()[:64].float().cpu().numpy().tobytes() for p in model.parameters())
    config = model.config.get_text_config()
    return {
        "family": config.model_type, "vocabulary": config.vocab_size, "layers": config.num_hidden_layers,
        "trained_parameters": sum(torch.Size(shape).numel() for shape in shapes.values()), "trained_tensors": len(shapes), "start": sha256(some).hexdigest()[:8],
    }  # fmt: skip


def save_model(model, tokenizer, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """A model folder for `from_pretrained`; of a model with adapters, the adapter for `PeftModel.from_pretrained`. `weights`: all of
    them, where the model's own are shares."""
    model.save_pretrained(folder, safe_serialization=True, **({} if weights is None else {"state_dict": weights}))
    tokenizer.save_pretrained(folder)


def base_adapter(model) -> Path | None:
    """The folder of the LoRA adapter that a model with adapters stands on (merged into its weights); `None`: it stands on none."""
    if not hasattr(model, "peft_config"):
        return None
    folder = Path(model.get_base_model().name_or_path)
    return folder if (folder / ADAPTER_CONFIG).exists() else None


def joins(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two adapters, by their configs, can be written as one: plain LoRA on the same layers, with nothing that peft's `LoraConfig`
    has not by itself."""
    from peft import LoraConfig

    free = {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "base_model_name_or_path",
        "task_type",
        "inference_mode",
        "revision",
    }
    free |= {"auto_mapping", "peft_version", "init_lora_weights", "peft_type"}
    plain = LoraConfig().to_dict()
    return set(first["target_modules"]) == set(second["target_modules"]) and all(
        getattr(one["peft_type"], "value", one["peft_type"]) == "LORA"
        and one.get("init_lora_weights", True) in (True, False, "gaussian")
        and all(not value or value == plain.get(name) for name, value in one.items() if name not in free)
        for one in (first, second)
    )


def join_adapters(first: Path, second: Path) -> None:
    """Write the adapter in `second`, trained on a model with `first` merged into it, as one adapter of the model that `first` is for:
    W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2], s = alpha / r. Its rank is the sum of both."""
    configs = [json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")) for folder in (first, second)]
    weights = [load_file(folder / ADAPTER) for folder in (first, second)]
    joined = {}
    for name in weights[0].keys() | weights[1].keys():
        pair = [one[name].float() for one in weights]
        if "lora_B" in name:
            joined[name] = torch.cat([b * (c["lora_alpha"] / c["r"]) for b, c in zip(pair, configs, strict=True)], 1)
        else:
            joined[name] = torch.cat(pair)
    rank = sum(config["r"] for config in configs)
    save_file({name: tensor.contiguous() for name, tensor in joined.items()}, second / ADAPTER, {"format": "pt"})
    config = json.dumps(configs[0] | {"r": rank, "lora_alpha": rank}, indent=2)
    (second / ADAPTER_CONFIG).write_text(config, encoding="utf-8")


def moments(model, optimizer: torch.optim.Optimizer, main: bool = True) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name, whole, in the main process; where layers are shared out to be called in all."""
    state = {
        f"{name}.{key}": value.detach()
        for name, parameter in _trained(model)
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return gathered(state, main)


def put_moments(tensors: dict[str, torch.Tensor], model, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser its state back, each process its share."""
    for name, parameter in _trained(model):
        found = {key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.rpartition(".")[0] == name}
        if found:
            optimizer.state[parameter] = {
                key: value if key == "step" else shared_out(value, parameter) for key, value in found.items()
            }


def save(
    folder: Path, update: int, model, tokenizer, weights: dict[str, torch.Tensor] | None, moments: dict[str, torch.Tensor],
    state: dict[str, Any],
) -> None:  # fmt: skip
    """Write `update-N` (N: the next update) and remove older ones."""

    def write(part: Path) -> None:
        save_model(model, tokenizer, part, weights)
        save_file(moments, part / OPTIMIZER)
        (part / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    name = f"update-{update:06d}"
    write_folder(folder / name, write)
    for old in folder.glob("update-*"):
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)


def load(checkpoint: Path, model, expected: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Put a model, all of it, where it was; returns `trainer.json` and what `put_moments` takes.

    Args:
        checkpoint: an `update-N` folder.
        model: of the same family and shapes.
        expected: values that `trainer.json` must hold, such as the model's `fingerprint`.

    Raises:
        TrainingError: it is of another model or run, or cannot be read; the difference is named.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        for key, value in expected.items():
            if state.get(key) != value:
                raise TrainingError(
                    f"{checkpoint} is a checkpoint of another run: its {key} is {state.get(key)!r}, here it is {value!r}. Give another "
                    "name, or remove it to begin anew."
                )
        tensors = load_file(checkpoint / OPTIMIZER)
        _load_weights(checkpoint, model)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TrainingError(f"{checkpoint} cannot be read: {error}. Remove it to begin from the start.") from error
    return state, tensors


def _trained(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _load_weights(checkpoint: Path, model) -> None:
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(checkpoint / ADAPTER))
        return
    loaded = type(model).from_pretrained(checkpoint, dtype=next(model.parameters()).dtype)
    model.load_state_dict(loaded.state_dict())
