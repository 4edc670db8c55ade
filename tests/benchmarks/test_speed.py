"""The speed suite on tiny models: its figures are of what they say. Nothing here looks at how long anything took."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from swirl_agents.testing import tiny_model, tiny_tokenizer
from swirl_algos import tree
from swirl_benchmarks import speed_gpu, speed_load, speed_rollout, speed_trl, speed_update
from swirl_benchmarks.timing import in_turn, spread

from swirl_env.errors import ConfigError

MODEL = tiny_model(tiny_tokenizer(), context=8192)


def printed(show, report):
    out = io.StringIO()
    show(report, Console(file=out, width=200))
    return out.getvalue()


def test_work_counts_what_a_pack_holds():
    states = speed_update.tree_of(3, 2, 20, speed_update.stream_of(MODEL), action=5, result=7)
    [pack] = tree.pack([states], 10_000)
    tokens, action_tokens, pairs = speed_update.work(states)
    assert tokens == pack.tokens
    assert action_tokens == len(pack.targets_N)
    tree_T, branch_T, sees_T = pack.layout.token_facts()
    at = np.arange(tokens)
    seen = (branch_T[None] == 0) & (at[None] <= sees_T[:, None])
    seen |= (branch_T[:, None] == branch_T) & (at[None] <= at[:, None])
    assert pairs == seen.sum()


@pytest.mark.slow
def test_update_figures():
    [figure] = speed_update.update_figures(MODEL, [(2, 2)], rounds=1)
    assert figure["logprob_difference"] < 1e-4
    assert figure["gradient_difference"] < 1e-5
    assert figure["compared"] == 4
    assert figure["tokens_packed"] == 310 + 4 * 39
    assert figure["tokens_plain"] == 2 * (150 + 39 + 310 + 39)
    curve = speed_update.curve_figures(MODEL, [(1, 1, 100), (2, 1, 100), (1, 3, 100), (3, 2, 300)], rounds=1)
    assert [point for point in curve["points"] if point.get("extrapolated")]
    text = printed(speed_update.print_update, {"shapes": [figure], "curve": curve})
    assert "extrapolated" in text and "times faster" in text


def test_the_curve_is_drawn(tmp_path):
    curve = {"points": [{"tokens": 10, "seconds": 1.0, "fitted_seconds": 1.1}, {"tokens": 99, "fitted_seconds": 9.0}]}
    for name in ("curve.png", "curve.svg"):
        speed_update.plot_update(curve, str(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.slow
def test_acting_figures_compare_tokens():
    fork = speed_rollout.fork_figures(MODEL, states=2, samples=2, rounds=1)
    assert fork["greedy"]["different"] == 0
    assert sum(fork["greedy"].values()) == 4
    [figure] = speed_rollout.rollout_figures(MODEL, [3], rounds=1)
    assert figure["greedy"]["different"] == 0
    assert sum(figure["greedy"].values()) == figure["steps"]
    assert "rollout: 3 episodes" in printed(speed_rollout.print_rollout, {"fork": [fork], "rollout": [figure]})


@pytest.mark.slow
def test_trl_plays_the_episodes_that_the_engine_plays(tmp_path):
    pytest.importorskip("trl")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, context=8192).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    figures = speed_trl.trl_figures(str(tmp_path), 3, rounds=1)
    assert figures["same_actions"] == figures["steps"] >= 5 + 2 * 2
    assert figures["tokens_of_actions"] >= 10 * figures["steps"]
    assert "of TRL" in printed(speed_trl.print_trl, figures)
    assert "not installed" in printed(speed_trl.print_trl, {"trl": None})


@pytest.mark.parametrize(
    ("got", "lead", "expected"),
    [
        ([1, 2, 3], [1.0, 1.0, 1.0], "same"),
        ([1, 9, 3], [1.0, 1e-6, 1.0], "tie"),
        ([1, 9, 3], [1e-6, 1.0, 1.0], "different"),
    ],
)
def test_where_greedy_rows_part(got, lead, expected):
    assert speed_rollout._apart(got, [1, 2, 3], lead) == expected


@pytest.mark.slow
def test_gpu_figures_on_a_small_model():
    model = speed_gpu.model_of("cpu", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=101)
    report = speed_gpu.gpu_figures(
        model, rounds=1, states=2, samples=2, trunk=60, action=6, result=8, batch=3, prompt=12, new=4, product=64
    )
    assert report["update"]["utilisation"] > 0
    assert "tokens/s" in printed(speed_gpu.print_gpu, report)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
            speed_gpu.gpu_figures()


@pytest.mark.slow
def test_load_figures():
    figures = speed_load.load_figures(rounds=1, trajectories=3)
    assert [figure["what"] for figure in figures][0] == "import swirl_env"
    assert "read 3 trajectories" in printed(speed_load.print_load, figures)


def test_rounds_take_turns_and_the_first_does_not_count():
    order = []
    seconds = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert spread([1.0, 2.0, 3.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
