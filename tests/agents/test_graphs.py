"""Steps of static shapes: what fills them up, which are kept, and on a GPU (of paper) whose memory they share."""

import gc
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from swirl_agents import graphs
from swirl_agents.graphs import Graphs


def step_of(size, runs):
    """A step that gives back what it reads."""
    read = torch.full((size,), 7)

    def step():
        runs.append(size)
        return read.clone()

    return step, [read]


def test_a_step_is_filled_up_with_its_padding():
    steps, runs = Graphs(torch.device("cpu")), []
    for given, expected in (([1, 2], [1, 2, 7]), ([5], [5, 7, 7])):
        assert steps.run(3, partial(step_of, 3, runs), [torch.tensor(given)]).tolist() == expected
    assert runs == [3, 3]


def run_all(steps, shapes):
    """Shapes whose step was made, in their order."""
    made = []

    def make(shape):
        made.append(shape)
        return step_of(shape, [])

    for shape in shapes:
        steps.run(shape, partial(make, shape), [torch.tensor([0])])
        assert len(steps) <= graphs.KEPT
    return made


def test_the_least_recently_used_is_dropped(monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    assert run_all(Graphs(torch.device("cpu")), [1, 2, 1, 3, 1, 2]) == [1, 2, 3, 2]


class Card:
    """What `Graphs` uses of `torch.cuda`. As there, a pool ends with its last graph, and capturing into it is an error from then on."""

    def __init__(self):
        self.living, self.pools, self.streams, card = weakref.WeakSet(), [], [], self

        class CUDAGraph:
            replayed = 0

            def pool(self):
                return self.memory

            def replay(self):
                self.replayed += 1

        class Stream:
            def __init__(self, device):
                card.streams.append(self)

            def wait_stream(self, other):
                pass

        @contextmanager
        def graph(captured, pool, stream, capture_error_mode):
            assert pool is None or any(pool is other.memory for other in card.living), "the pool has ended"
            assert stream in card.streams
            captured.memory = pool or object()
            yield
            card.living.add(captured)
            card.pools.append(captured.memory)

        @contextmanager
        def stream(chosen):
            assert chosen in card.streams
            yield

        self.CUDAGraph, self.Stream, self.graph, self.stream = CUDAGraph, Stream, graph, stream
        self.current_stream = Stream


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    monkeypatch.setattr(graphs, "WORTH", 1)
    monkeypatch.setattr(torch, "cuda", card := Card())
    gc.disable()
    yield card
    gc.enable()


def test_captured_steps_share_one_pool_and_dropped_ones_are_freed(card):
    steps = Graphs(torch.device("cuda"))
    assert run_all(steps, [1, 2, 3, 4, 3]) == [1, 2, 3, 4]
    assert len({id(pool) for pool in card.pools}) == 1
    assert len(card.living) == 2
    steps.clear()
    assert not card.living
    assert run_all(steps, [1, 2]) == [1, 2]
    assert len({id(pool) for pool in card.pools}) == 2  # the first ended with its graphs


def test_a_captured_step_is_warmed_up_and_then_replayed(card):
    steps, runs = Graphs(torch.device("cuda")), []
    for _ in range(3):
        steps.run(3, partial(step_of, 3, runs), [torch.tensor([1])])
    assert len(runs) == 3  # two to warm up, one captured
    assert [graph.replayed for graph in card.living] == [3]


def test_a_step_is_captured_once_it_has_recurred(card, monkeypatch):
    monkeypatch.setattr(graphs, "WORTH", 3)
    steps, runs = Graphs(torch.device("cuda")), []
    for use, expected in enumerate(([1], [1, 2], [1, 2, 5], [1, 2, 5]), 1):
        given = steps.run(3, partial(step_of, 3, runs), [torch.tensor([use])])
        assert [len(runs)] == expected[-1:]
        assert (len(card.living) == 1) == (use >= 3)
        assert use >= 3 or given.tolist() == [use, 7, 7]
    run_all(steps, [4, 4, 4])  # one that is not captured lends no pool, and the pool of the captured one is found
    assert len({id(pool) for pool in card.pools}) == 1


def test_no_garbage_is_collected_while_a_step_is_captured(card, monkeypatch):
    """A graph freed meanwhile spoils the capture."""
    inside, graph = [], card.graph

    def noted(*args, **kwargs):
        inside.append(gc.isenabled())
        return graph(*args, **kwargs)

    monkeypatch.setattr(card, "graph", noted)
    gc.enable()
    Graphs(torch.device("cuda")).run(3, partial(step_of, 3, []), [torch.tensor([1])])
    assert inside == [False]
    assert gc.isenabled()
