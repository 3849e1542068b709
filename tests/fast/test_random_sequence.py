"""A training's random numbers are its own: as if nobody else drew any."""

import pytest
import torch

from fast.random_sequence import RandomSequence
from tests.fast.against_reference import every_device

CPU = torch.device("cpu")


def test_it_goes_on_where_the_default_generator_stood_and_leaves_that_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(6)
    torch.manual_seed(0)
    sequence = RandomSequence(CPU)
    with sequence:
        first = torch.rand(2)
    outside = torch.rand(6)
    with sequence:
        rest = torch.rand(4)
    assert torch.equal(torch.cat([first, rest]), expected)
    assert torch.equal(outside, expected)


def test_two_in_turns_draw_what_each_draws_alone() -> None:
    sequences, expected = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        sequences.append(RandomSequence(CPU))
        expected.append(torch.rand(3))
    drawn: list[list[torch.Tensor]] = [[], []]
    for i in (0, 1, 1, 0, 0, 1):
        with sequences[i]:
            drawn[i].append(torch.rand(1))
    for found, wanted in zip(drawn, expected, strict=True):
        assert torch.equal(torch.cat(found), wanted)


def test_entering_twice_does_not_go_back() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sequence = RandomSequence(CPU)
    with sequence:
        drawn = [torch.rand(1)]
        with sequence:
            drawn.append(torch.rand(1))
        drawn.append(torch.rand(1))
    assert torch.equal(torch.cat(drawn), expected)


def test_an_error_inside_gives_the_generator_back() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)

    def fail() -> None:
        with RandomSequence(CPU):
            torch.rand(5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.rand(1), expected)


@every_device
def test_another_one_goes_on_where_it_stood(device: str) -> None:
    """Whatever either draws afterwards, and however often one goes back there."""
    where = torch.device(device)

    def draw(sequence: RandomSequence) -> torch.Tensor:
        with sequence:
            return torch.stack([torch.rand(5), torch.rand(5, device=where).cpu()])

    torch.manual_seed(0)
    sequence = RandomSequence(where)
    draw(sequence)
    state = sequence.state()
    expected = draw(sequence), draw(sequence)
    assert not torch.equal(*expected)
    assert all(value.dtype == torch.uint8 and value.device.type == "cpu" and value.dim() == 1 for value in state.values())
    torch.manual_seed(1)
    for _ in range(2):
        other = RandomSequence(where)
        other.restore(state)
        assert torch.equal(draw(other), expected[0])
        assert torch.equal(draw(other), expected[1])
    sequence.restore(state)
    assert torch.equal(draw(sequence), expected[0])


def test_to_go_on_elsewhere_leaves_the_default_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(6)
    torch.manual_seed(1)
    state = RandomSequence(CPU).state()
    torch.manual_seed(0)
    RandomSequence(CPU).restore(state)
    assert torch.equal(torch.rand(6), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_replays_of_a_graph_draw_from_the_sequence_in_which_it_was_captured() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    sequence = RandomSequence(device)
    expected = torch.cat([torch.rand(1, device=device) for _ in range(3)])  # rand(3) gives each thread numbers of its own
    graph, out = torch.cuda.CUDAGraph(), torch.empty(1, device=device)
    with sequence, torch.cuda.graph(graph):
        out.copy_(torch.rand(1, device=device))
    drawn = []
    for _ in range(3):
        torch.rand(7, device=device)  # somebody else
        graph.replay()
        drawn.append(out.clone())
    assert len(set(torch.cat(drawn).tolist())) == 3
    assert torch.equal(torch.cat(drawn), expected)
