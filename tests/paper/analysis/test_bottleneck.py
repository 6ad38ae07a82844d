"""The bottleneck against closed forms and a source whose rate–distortion function is known."""

import math
from statistics import NormalDist

import pytest
import torch

from megameta.paper.analysis.bottleneck import (
    Bottleneck,
    Examples,
    Fitting,
    Point,
    cross_entropy,
    kl_to_standard_normal,
    sweep,
)
from megameta.paper.analysis.rate_distortion import (
    compare,
    cut_behind_meta,
    earlier_slots,
    split_by_window,
    unigram_floor,
    verdict,
)
from megameta.statistics import half_width


def test_divergence_against_torch_and_by_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    log_variance = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    found = kl_to_standard_normal(mean, log_variance)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    assert torch.allclose(found, torch.distributions.kl_divergence(normal, standard).sum(dim=1), atol=1e-12)
    torch.manual_seed(1)
    z = normal.sample((200_000,))
    sampled = (normal.log_prob(z) - standard.log_prob(z)).sum(dim=-1)
    assert ((found - sampled.mean(dim=0)).abs() < 5 * sampled.std(dim=0) / 200_000**0.5).all()
    assert (found >= 0).all()
    assert float(kl_to_standard_normal(torch.zeros(1, 4), torch.zeros(1, 4))) == 0


def test_gaussian_source_has_its_known_rate_distortion_function() -> None:
    """X normal of variance 1, squared error: R(D) = ½ ln(1 / D), and D + β R is least at D = β / 2."""
    generator = torch.Generator().manual_seed(2)
    state = torch.randn(20_000, 1, generator=generator)
    train, held_out = Examples(state[:10_000], state[:10_000]), Examples(state[10_000:], state[10_000:])

    def squared(outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (outputs - wanted).square().sum(dim=-1)

    betas = (0.1, 0.2, 0.5, 1.0)
    fitting = Fitting(bottleneck=1, first_steps=700, steps=300, batch=512, learning_rate=1e-2)
    points = sweep(train, held_out, betas, squared, 1, seed=0, fitting=fitting)
    for point in points:
        assert point.distortion == pytest.approx(point.beta / 2, rel=0.12)
        assert point.rate == pytest.approx(0.5 * math.log(2 / point.beta), abs=0.06)
        assert point.rate >= 0.5 * math.log(1 / point.distortion) - 0.04  # no code beats the function
    rates = [point.rate for point in points]
    assert rates == sorted(rates, reverse=True)


def ids_from_states(count: int, seed: int) -> tuple[Examples, torch.Tensor]:
    """Eight classes, seen through noise; the projection that tells them."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(8, 6, generator=torch.Generator().manual_seed(99))
    wanted = torch.randint(8, (count,), generator=generator)
    return Examples(centre[wanted] + 0.3 * torch.randn(count, 6, generator=generator), wanted), centre


@pytest.mark.parametrize("started", [False, True])
def test_rate_falls_with_beta_and_nothing_else_is_touched(started: bool) -> None:
    (train, projection), (held_out, _) = ids_from_states(3000, 0), ids_from_states(1000, 1)
    before = train.state_ND.clone(), train.wanted.clone(), torch.get_rng_state()
    fitting = Fitting(bottleneck=4, first_steps=400, steps=400, batch=128, learning_rate=1e-2)
    output = projection if started else None
    points = sweep(train, held_out, (0.01, 0.1, 0.5, 3.0), cross_entropy, 8, 3, output_VD=output, fitting=fitting)
    rates, distortions = [p.rate for p in points], [p.distortion for p in points]
    assert rates == sorted(rates, reverse=True) and rates[0] > 1.5
    assert distortions == sorted(distortions) and distortions[0] < 0.3
    assert rates[-1] < 0.05 and abs(distortions[-1] - math.log(8)) < 0.06  # nothing passes: the entropy is left
    for point in points:  # what passes cannot be less than what it tells
        assert point.rate >= math.log(8) - point.distortion - 0.05
    assert torch.equal(before[0], train.state_ND) and torch.equal(before[1], train.wanted)
    assert torch.equal(before[2], torch.get_rng_state())
    again = sweep(train, held_out, (3.0, 0.5, 0.1, 0.01), cross_entropy, 8, 3, output_VD=output, fitting=fitting)
    assert again == points


def test_start_is_the_projection_itself_where_it_fits() -> None:
    examples, projection = ids_from_states(500, 4)
    net = Bottleneck(6, 6, 8, torch.Generator().manual_seed(0))
    net.start_from(examples.state_ND, projection)
    outputs, _ = net(examples.state_ND, torch.zeros(500, 6))
    assert torch.allclose(outputs, examples.state_ND @ projection.T, atol=1e-3)


def test_cuts_stand_between_two_text_tokens_of_one_document() -> None:
    meta, none = 9, -100
    token = torch.tensor([[9, 1, 9, 2, 9, 9, 3, 4, 9, 5], [1, 2, 9, 3, 9, 4, 5, 9, 6, 9]])
    label = torch.tensor([[1, none, 2, none, none, 3, 4, none, 5, 6], [2, none, 3, none, none, 5, none, 6, none, 7]])
    found = cut_behind_meta(token, label, None, meta)
    assert found.nonzero().tolist() == [[0, 2], [0, 8], [1, 2], [1, 7], [1, 9]]
    document = torch.tensor([[0] * 10, [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
    assert cut_behind_meta(token, label, document, meta).nonzero().tolist() == [[0, 2], [0, 8], [1, 7], [1, 9]]


def test_earlier_slots_are_text_and_earlier() -> None:
    is_text = torch.tensor([[True, False, True, True, False, True] * 10])
    slots = torch.tensor([0, 2, 3, 59] + [59] * 500)
    found = earlier_slots(is_text, torch.zeros(504, dtype=torch.long), slots, torch.Generator().manual_seed(0))
    assert found[:3].tolist()[:2] == [0, 0] and int(found[2]) in (0, 2)
    reached = set(found[3:].tolist())
    assert reached == {slot for slot in range(59 - 32, 59) if is_text[0, slot]}


def test_unigram_floor_and_split() -> None:
    floor = unigram_floor(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2]), 4)
    assert floor == pytest.approx(-(math.log(4 / 8) + math.log(1 / 8)) / 2)
    window = torch.arange(10).repeat(30)
    out = split_by_window(window, 0)
    assert sorted(set(window[out].tolist()) & set(window[~out].tolist())) == []
    assert len(set(window[out].tolist())) == 3
    assert not torch.equal(out, split_by_window(window, 1))


def curve(shift: float, rates: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)) -> list[Point]:
    return [Point(0.1, rate, 6 - rate + shift) for rate in rates]


def test_claims_follow_from_intervals_at_matched_rates() -> None:
    reference = [curve(0.0), curve(0.1), curve(-0.1)]
    lower = [curve(-0.5, (3.0, 1.5, 0.7)), curve(-0.42, (3.2, 1.5, 0.6)), curve(-0.58, (3.0, 1.4, 0.6))]
    rows = compare(lower, reference)
    assert rows[0]["rate (nats)"] == 0.7 and rows[-1]["rate (nats)"] == 3.0
    values = [-0.5, -0.52, -0.48]
    for row in rows:
        assert row["difference (nats)"] == pytest.approx(-0.5)
        assert row["high"] - row["low"] == pytest.approx(2 * half_width(values))
    assert "holds at all 7 matched rates from 0.70 to 3.00" in verdict(rows, "x")
    assert "is false at all 7" in verdict(compare(reference, lower), "x")
    mixed = [curve(s) for s in (0.3, -0.3, 0.0)]
    assert "holds at 0, is false at 0, and 7 are not resolved" in verdict(compare(mixed, reference[::-1]), "x")
    apart = [curve(0.0, (0.4, 0.1))] * 3
    assert compare(apart, reference) == [] and "share no rate" in verdict([], "x")


def test_half_width_against_the_normal_for_many_values() -> None:
    values = [float(x) for x in torch.randn(2000, generator=torch.Generator().manual_seed(0))]
    spread = torch.tensor(values).std().item()
    assert half_width(values) == pytest.approx(NormalDist().inv_cdf(0.975) * spread / 2000**0.5, rel=2e-3)
