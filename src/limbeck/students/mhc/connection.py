"""One hyper-connection: how n residual streams go into a sublayer F, past it, and take what comes out of it.

    pre = σ(α₁ x' W_p + b_p),   post = 2σ(α₂ x' W_q + b_q),   x' = RMSNorm(vec X)
    R = Σ_k softmax(α₃ x' W_r + b_r)_k P_k      over all n! permutation matrices
    X' = R X + post ⊗ F(preᵀ X)

The one idea: by the theorem of Birkhoff and von Neumann the convex combinations of permutations are all doubly
stochastic matrices, so R is one whatever the logits are, which twenty Sinkhorn steps are not. With the first biases
the mean of the streams is what the single stream would be: a model that was trained before computes what it did.

Source: mHC-lite (arXiv 2601.05732), mHC (arXiv 2512.24880).
Shapes: B rows, T positions, N streams, D width.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import nn

from limbeck.students.mixing import OwnModule

Tensor = torch.Tensor
MOST_STREAMS = 4  # of 5 there are 120 permutations
_ALPHA = 0.01
_SWAP = -8.0  # logit of every permutation but the identity at first
_SPREAD = 0.5  # logits of `post` at first: streams that all took the same would stay equal for ever
FORMS = ("dynamic", "static")


def first_post_logits(streams: int, number: int) -> list[float]:
    """±spread by turns (0 for one of an odd number), so that 2σ of them has mean 1 and streams differ.

    Args:
        streams: N.
        number: the sublayer's; the signs turn with it.
    """
    pairs = streams // 2
    values = [_SPREAD, -_SPREAD] * pairs + [0.0] * (streams % 2)
    turn = number % streams
    return values[turn:] + values[:turn]


class HyperConnection(OwnModule):
    """The mixing around one sublayer.

    Args:
        streams: N.
        width: D.
        number: of the sublayer in the model.
        dynamic: mixing depends on the token; else only on the biases.
        eps: of the norm.

    Attributes:
        recorded: a list that every R `[..., N, N]` is appended to; None: nothing is recorded.
    """

    def __init__(self, streams: int, width: int, number: int, dynamic: bool, eps: float) -> None:
        super().__init__()
        self.streams, self.number, self.dynamic, self.eps = streams, number, dynamic, eps
        orders = math.factorial(streams)
        self.bias = nn.Parameter(torch.zeros(2 * streams + orders))
        if dynamic:
            self.weight = nn.Parameter(torch.zeros(2 * streams + orders, streams * width))
            self.alpha = nn.Parameter(torch.zeros(3))
        self.register_buffer("permutations", torch.zeros(orders, streams, streams), persistent=False)
        self.recorded: list[Tensor] | None = None
        with torch.no_grad():
            for name, value in self.initial().items():
                getattr(self, name).copy_(value)

    def initial(self) -> dict[str, Tensor]:
        """Parameters and buffers as they begin: the mean of the streams is the single stream."""
        n = self.streams
        pre = [-math.log(n - 1.0)] * n if n > 1 else [16.0]  # one stream is taken whole
        mix = [0.0] + [_SWAP] * (math.factorial(n) - 1)
        orders = torch.tensor(list(itertools.permutations(range(n))))
        found = {
            "bias": torch.tensor(pre + first_post_logits(n, self.number) + mix),
            "permutations": nn.functional.one_hot(orders, n).float(),
        }
        if self.dynamic:
            found |= {"weight": torch.zeros(self.weight.shape), "alpha": torch.full((3,), _ALPHA)}
        return found

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pre `[..., N]`, post `[..., N]` and R `[..., N, N]` of streams `[..., N, D]`, in float32 at least."""
        n = self.streams
        exact = torch.promote_types(streams.dtype, torch.float32)
        with torch.autocast(streams.device.type, enabled=False):
            logits = self.bias.to(exact)
            if self.dynamic:
                x = streams.to(exact).flatten(-2)
                x = nn.functional.rms_norm(x, (x.shape[-1],), None, self.eps)
                found = nn.functional.linear(x, self.weight.to(exact))
                parts = zip(self.alpha.to(exact), _split(found, n), strict=True)
                logits = torch.cat([alpha * part for alpha, part in parts], dim=-1) + logits
            pre, post, mix = _split(logits, n)
            mixing = torch.einsum("...k,kij->...ij", mix.softmax(dim=-1), self.permutations.to(exact))
        if self.recorded is not None:
            self.recorded.append(mixing.detach())
        return pre.sigmoid(), 2.0 * post.sigmoid(), mixing

    def forward(self, streams: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """`[B, T, N, D]` to `[B, T, N, D]` around a sublayer of `[B, T, D]`."""
        pre, post, mixing = self.coefficients(streams)
        exact = streams.to(pre.dtype)
        out = sublayer((pre.unsqueeze(-1) * exact).sum(dim=-2).to(streams.dtype))
        # What is added up over all layers is rounded once a sublayer, not at each product.
        with torch.autocast(streams.device.type, enabled=False):
            mixed = mixing @ exact + post.unsqueeze(-1) * out.to(pre.dtype).unsqueeze(-2)
        return mixed.to(streams.dtype)


def _split(logits: Tensor, streams: int) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of `[..., 2N + N!]` that are for pre, post and R."""
    return logits[..., :streams], logits[..., streams : 2 * streams], logits[..., 2 * streams :]


def connections(model: nn.Module) -> list[HyperConnection]:
    """The model's hyper-connections, in the order in which a token passes them; none where it has one stream."""
    return [module for module in model.modules() if isinstance(module, HyperConnection)]
