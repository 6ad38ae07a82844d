"""A variational information bottleneck (Alemi et al. 2017): a Gaussian head on given states, then a linear decoder.

For each β the head and the decoder minimise distortion + β · rate, where the rate is the mean KL divergence of the
head's Gaussian from a standard normal: an upper bound of the information, in nats, that passes. The distortion is that
of held-out examples, and so bounds from above what is attainable at that rate.

Letters: N examples, D width of the states, Z width of the bottleneck, V outputs of the decoder.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: (outputs of the decoder (N, V), what they should say) → a number an example (N,).
Distortion = Callable[[Tensor, Tensor], Tensor]


class Point(NamedTuple):
    """Rate in nats and distortion on held-out examples, at one β."""

    beta: float
    rate: float
    distortion: float


class Examples(NamedTuple):
    """States (N, D) and what they should tell: ids (N,), or numbers (N, V)."""

    state_ND: Tensor
    wanted: Tensor


def cross_entropy(logits_NV: Tensor, wanted_N: Tensor) -> Tensor:
    """In nats (N,)."""
    return F.cross_entropy(logits_NV, wanted_N, reduction="none")


def kl_to_standard_normal(mean_NZ: Tensor, log_variance_NZ: Tensor) -> Tensor:
    """KL(N(mean, variance) ‖ N(0, 1)), summed over Z, in nats: (N,)."""
    return 0.5 * (mean_NZ.square() + log_variance_NZ.exp() - 1 - log_variance_NZ).sum(dim=-1)


class Bottleneck(nn.Module):
    """The head and the decoder; the first outputs are noise alone until it is fitted or started (``start_from``)."""

    def __init__(self, width: int, bottleneck: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        # Their own initial values would come from torch's global generator.
        self.mean, self.log_variance, self.decoder = (
            nn.utils.skip_init(nn.Linear, *shape)
            for shape in ((width, bottleneck), (width, bottleneck), (bottleneck, outputs))
        )
        with torch.no_grad():
            for layer in (self.mean, self.decoder):
                layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()
            self.log_variance.weight.zero_()
            self.log_variance.bias.fill_(-2.0)

    @torch.no_grad()
    def start_from(self, state_ND: Tensor, output_VD: Tensor) -> None:
        """Begin as a model's own output projection, cut to its Z strongest directions: what it knows of the V outputs
        need not be learned from few examples. The mean is scaled to variance 1 over the examples."""
        size = self.mean.out_features
        direction_DZ = torch.linalg.eigh(output_VD.T @ output_VD).eigenvectors[:, -size:]
        centre_D = state_ND.mean(dim=0)
        spread_Z = ((state_ND - centre_D) @ direction_DZ).std(dim=0).clamp(min=1e-6)
        self.mean.weight.copy_((direction_DZ / spread_Z).T)
        self.mean.bias.copy_(-(centre_D @ direction_DZ) / spread_Z)
        self.decoder.weight.copy_(output_VD @ direction_DZ * spread_Z)
        self.decoder.bias.copy_(output_VD @ centre_D)

    def forward(self, state_ND: Tensor, noise_NZ: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the decoder (N, V) and rates (N,)."""
        mean_NZ, log_variance_NZ = self.mean(state_ND), self.log_variance(state_ND).clamp(-12, 6)
        outputs_NV = self.decoder(mean_NZ + (0.5 * log_variance_NZ).exp() * noise_NZ)
        return outputs_NV, kl_to_standard_normal(mean_NZ, log_variance_NZ)


class Fitting(NamedTuple):
    """How a sweep is fitted."""

    bottleneck: int = 32
    first_steps: int = 300
    """Steps at the first β; each later one goes on from the one before."""
    steps: int = 150
    batch: int = 256
    learning_rate: float = 2e-3


def sweep(
    train: Examples,
    held_out: Examples,
    betas: Sequence[float],
    distortion: Distortion,
    outputs: int,
    seed: int,
    *,
    output_VD: Tensor | None = None,
    fitting: Fitting = Fitting(),  # noqa: B008  # immutable
) -> list[Point]:
    """A curve: one point a β, ascending. Neither the states nor torch's global generator are touched.

    Args:
        outputs: V.
        output_VD: begin from this projection (``Bottleneck.start_from``).
    """
    generator = torch.Generator().manual_seed(seed)
    states = train.state_ND
    with torch.enable_grad():
        net = Bottleneck(states.shape[1], fitting.bottleneck, outputs, generator).to(states)
        if output_VD is not None:
            net.start_from(states, output_VD.to(states))
        optimizer = torch.optim.Adam(net.parameters(), lr=fitting.learning_rate)
        points = []
        for number, beta in enumerate(sorted(betas)):
            steps = fitting.steps if number else fitting.first_steps
            for step in range(steps):
                # The last third of each β's steps anneals to a tenth, so that points are not noise of the optimiser.
                scale = 1.0 if step < 2 * steps // 3 else 1 - 0.9 * (3 * step / steps - 2)
                optimizer.param_groups[0]["lr"] = fitting.learning_rate * scale
                chosen = torch.randint(len(states), (fitting.batch,), generator=generator)
                outputs_NV, rate_N = net(states[chosen], _noise(fitting.batch, fitting, generator, states))
                loss = distortion(outputs_NV, train.wanted[chosen]).mean() + beta * rate_N.mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            points.append(_measure(net, held_out, beta, distortion, generator, fitting))
    return points


def _noise(rows: int, fitting: Fitting, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(rows, fitting.bottleneck, generator=generator).to(like)


@torch.no_grad()
def _measure(
    net: Bottleneck,
    held_out: Examples,
    beta: float,
    distortion: Distortion,
    generator: torch.Generator,
    fitting: Fitting,
) -> Point:
    rates, distortions = [], []
    for state_ND, wanted in zip(held_out.state_ND.split(2048), held_out.wanted.split(2048), strict=True):
        outputs_NV, rate_N = net(state_ND, _noise(len(state_ND), fitting, generator, state_ND))
        rates.append(rate_N)
        distortions.append(distortion(outputs_NV, wanted))
    return Point(beta, float(torch.cat(rates).double().mean()), float(torch.cat(distortions).double().mean()))
