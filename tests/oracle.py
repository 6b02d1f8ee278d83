"""The paper once more, slow and dense, with loops: what the package is checked against.

Nothing here is imported from kfqn. A network is a list of modules; its trainable ones are
replaced by the matrix W times the vectors a_t of eq. (1).
"""

import functools
import itertools
import math
import sys

import torch
import torch.nn.functional as F
from foreign import Conv1D
from torch import nn

LINEAR = (nn.Linear, Conv1D)
TRAINABLE = (*LINEAR, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def vectors(module, a):
    """a_t(n) for one layer, or one group's channels, (m, |T|, C), and the shape of T."""
    if isinstance(module, LINEAR):
        at, T = a.reshape(len(a), -1, a.shape[-1]), tuple(a.shape[1:-1])
    else:
        k, s, d = module.kernel_size, module.stride, module.dilation
        if module.padding == "same":
            totals = [di * (ki - 1) for ki, di in zip(k, d, strict=True)]
            pad = [(t // 2, t - t // 2) for t in totals]
        elif module.padding == "valid":
            pad = [(0, 0) for _ in k]
        else:
            pad = [(p, p) for p in module.padding]
        mode = {"zeros": "constant"}.get(module.padding_mode, module.padding_mode)
        a = F.pad(a, [p for pair in reversed(pad) for p in pair], mode=mode)
        found, T = entries(tuple(a.shape[1:]), k, s, d)
        at = a.flatten(1)[:, found]
    one = at.new_ones(*at.shape[:-1], 0 if module.bias is None else 1)
    return torch.cat((at, one), dim=-1), T


@functools.cache
def entries(shape, k, s, d):
    """Which entries of an input (channels, *size) make a_t, (|T|, columns), one by one; the shape of T."""
    numbers = torch.arange(math.prod(shape)).view(shape)
    T = [(n - di * (ki - 1) - 1) // si + 1 for n, ki, si, di in zip(shape[1:], k, s, d, strict=True)]
    rows = []
    for t in itertools.product(*map(range, T)):
        rows.append(
            [
                numbers[
                    (j, *(ti * si + ei * di for ti, si, ei, di in zip(t, s, delta, d, strict=True)))
                ].item()
                for j in range(shape[0])
                for delta in itertools.product(*map(range, k))
            ]
        )
    return torch.tensor(rows), tuple(T)


def matrix(module):
    """W = [weight | bias], (I, C), of all groups one below the other."""
    weight = module.weight.detach()
    columns = [weight.T if isinstance(module, Conv1D) else weight.flatten(1)]
    if module.bias is not None:
        columns.append(module.bias.detach()[:, None])
    return torch.cat(columns, dim=1).clone()


def layers(net):
    """The module of every matrix, in the order of `matrices`."""
    modules = {m.weight: m for m in reversed(list(net)) if isinstance(m, TRAINABLE)}
    return [m for m in reversed(modules.values()) for _ in range(getattr(m, "groups", 1))]


def column_channels(module):
    """The channel of each column of a group's W but the bias."""
    if isinstance(module, Conv1D):
        return [*range(len(module.weight))]
    return [j for j in range(module.weight.shape[1]) for _ in range(module.weight[0, 0].numel())]


def blocks(channels, largest, bias):
    """Which rows of a factor stay together: as few and alike runs of channels as fit ``largest`` rows."""
    n, of_each = max(channels) + 1, channels.count(0)
    if len(channels) + bias <= largest:
        return [slice(0, len(channels) + bias)]
    most = max(1, (largest - bias) // of_each)
    width = -(-n // -(-n // most)) * of_each
    starts = [*range(0, len(channels), width)]
    stops = [*starts[1:], len(channels) + bias]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]


def matrices(net):
    """W (I, C) of every layer, in turn: a group is a layer of its own, and a shared weight one layer."""
    modules = {m.weight: m for m in reversed(list(net)) if isinstance(m, TRAINABLE)}
    for module in reversed(modules.values()):
        yield from matrix(module).chunk(getattr(module, "groups", 1))


def second_moment(at):
    """Eq. (8): mean over data, sum over locations, of a_t a_tᵀ."""
    return sum(torch.outer(v, v) for an in at for v in an) / len(at)


def damped(s, y, Hy, mu1, mu2):
    """Algorithm 1, with its branches."""
    sy, yHy = float(s @ y), float(y @ Hy)
    theta = (1 - mu1) * yHy / (yHy - sy) if sy < mu1 * yHy else 1.0
    s = theta * s + (1 - theta) * Hy
    return s, y + mu2 * s


def bfgs(H, s, y):
    """Eq. (9) as printed."""
    rho, eye = 1 / (y @ s), torch.eye(len(s), dtype=H.dtype)
    left = eye - rho * torch.outer(s, y)
    return left @ H @ left.T + rho * torch.outer(s, s)


class Algorithm2:
    """KF-QN-CNN for a list of modules and a batch-mean loss; ``history`` None is BFGS, a number L-BFGS.

    Of factors with more than ``largest`` rows only blocks are kept.
    """

    def __init__(self, net, loss, lr, damping, beta, mu1, weight_decay, history=None, largest=None):
        self.net, self.loss, self.history = list(net), loss, history
        self.lr, self.lam, self.beta, self.mu1, self.decay = lr, damping**0.5, beta, mu1, weight_decay
        self.decoupled = 0.0  # lr times a decoupled weight decay
        self.bias_decay = 1.0  # what share of the weights' decay the biases have
        modules = layers(self.net)
        self.with_bias = [m.bias is not None for m in modules]
        self.interval, self.steps = 1, 0  # curvature is learnt at every so manyth step
        largest = largest or sys.maxsize
        self.blocks_A = [blocks(column_channels(m), largest, m.bias is not None) for m in modules]
        self.blocks_G = [blocks([*range(len(W))], largest, False) for W in matrices(self.net)]
        self.W = list(matrices(self.net))
        self.average = [torch.zeros_like(W) for W in self.W]
        self.s_G = [torch.zeros(len(W), dtype=W.dtype) for W in self.W]
        self.y_G = [torch.zeros(len(W), dtype=W.dtype) for W in self.W]
        self.H_G = [torch.eye(len(W), dtype=W.dtype) for W in self.W]
        self.pairs = [[] for _ in self.W]
        self.H_A = None

    def forward(self, x):
        """The output for a batch, with a_t (m, |T|, C) and h_t (m, |T|, I) of every use of every layer."""
        a_list, h_list, of_weight, count = [[] for _ in self.W], [[] for _ in self.W], {}, 0
        for m in self.net:
            if isinstance(m, TRAINABLE):
                groups = getattr(m, "groups", 1)
                first = of_weight.setdefault(m.weight, count)
                count = max(count, first + groups)
                parts = [x] if groups == 1 else x.chunk(groups, 1)
                outputs = []
                for i, part in enumerate(parts, start=first):
                    at, T = vectors(m, part)
                    h = at @ self.W[i].T
                    if h.requires_grad:
                        h.retain_grad()
                    else:
                        h.requires_grad_(True)
                    a_list[i].append(at.detach())
                    h_list[i].append(h)
                    if isinstance(m, LINEAR):
                        outputs.append(h.reshape(len(x), *T, h.shape[2]))
                    else:
                        outputs.append(h.transpose(1, 2).reshape(len(x), h.shape[2], *T))
                x = outputs[0] if groups == 1 else torch.cat(outputs, 1)
            elif isinstance(m, nn.ReLU):
                x = F.relu(x)
            else:
                x = m(x)
        return x, a_list, h_list

    def pass_over(self, x, target):
        """a_t, h_t and Dh_t of every layer: Dh belongs to the loss of one datum."""
        a_all, h_all, D_all = [], [], []
        for n in range(len(x)):
            output, a, h = self.forward(x[n : n + 1])
            self.loss(output, target[n : n + 1]).backward()
            a_all.append([torch.cat([v[0] for v in uses]) for uses in a])  # uses are locations
            h_all.append([torch.cat([v[0].detach() for v in uses]) for uses in h])
            D_all.append([torch.cat([v.grad[0] for v in uses]) for uses in h])
        return [[torch.stack(v) for v in zip(*per, strict=True)] for per in (a_all, h_all, D_all)]

    def start(self, batches):
        """Line 2: A over all data of the batches."""
        passes = [[torch.cat(uses, 1) for uses in self.forward(x)[1]] for x in batches]
        self.start_from([[an for batch in a for an in batch] for a in zip(*passes, strict=True)])

    def start_from(self, inputs):
        """H_A of every layer from its a_t over all data."""
        self.H_A = []
        for at, cut in zip(inputs, self.blocks_A, strict=True):
            A = second_moment(at)
            A = torch.block_diag(*[A[b][:, b] for b in cut])
            self.H_A.append(torch.linalg.inv(A + self.lam * torch.eye(len(A), dtype=A.dtype)))

    def decayed(self, i, decay):
        """Weight decay of a layer, that of the bias apart."""
        shares = torch.full_like(self.W[i], decay)
        if self.with_bias[i]:
            shares[:, -1] *= self.bias_decay
        return shares * self.W[i]

    def step(self, x, target):
        """Lines 5-19."""
        if self.H_A is None:
            self.start([x])
        a, h, Dh = self.pass_over(x, target)
        for i in range(len(self.W)):
            DW = sum(
                torch.outer(D, v)
                for Dn, an in zip(Dh[i], a[i], strict=True)
                for D, v in zip(Dn, an, strict=True)
            ) / len(x)
            DW = DW + self.decayed(i, self.decay)
            self.average[i] = self.beta * self.average[i] + (1 - self.beta) * DW
            self.W[i] = self.W[i] - self.decayed(i, self.decoupled)
            self.W[i] = self.W[i] - self.lr * self.H_G[i] @ self.average[i] @ self.H_A[i]
        self.steps += 1
        k = self.steps - 1
        if k % min(self.interval, max(1, k // 10)):  # young factors learn more often
            return
        _, h_new, Dh_new = self.pass_over(x, target)
        for i in range(len(self.W)):
            s_A = self.H_A[i] @ a[i].mean((0, 1))
            A = second_moment(a[i])
            for b in self.blocks_A[i]:
                y_A = A[b][:, b] @ s_A[b] + self.lam * s_A[b]
                if s_A[b] @ y_A > 0:
                    self.H_A[i][b.start : b.stop, b.start : b.stop] = bfgs(self.H_A[i][b][:, b], s_A[b], y_A)
            ds = (h_new[i] - h[i]).mean((0, 1))
            dy = (Dh_new[i] - Dh[i]).mean((0, 1))
            self.s_G[i] = self.beta * self.s_G[i] + (1 - self.beta) * ds
            self.y_G[i] = self.beta * self.y_G[i] + (1 - self.beta) * dy
            Hy = self.H_G[i] @ self.y_G[i]
            if self.history is None:
                for b in self.blocks_G[i]:
                    s, y = damped(self.s_G[i][b], self.y_G[i][b], Hy[b], self.mu1, self.lam)
                    if s @ y > 0:
                        self.H_G[i][b.start : b.stop, b.start : b.stop] = bfgs(self.H_G[i][b][:, b], s, y)
                continue
            s, y = damped(self.s_G[i], self.y_G[i], Hy, self.mu1, self.lam)
            if s @ y > 0:  # eq. (14) over the pairs kept, from I
                self.pairs[i] = [*self.pairs[i], (s, y)][-self.history :]
                self.H_G[i] = torch.eye(len(s), dtype=s.dtype)
                for pair in self.pairs[i]:
                    self.H_G[i] = bfgs(self.H_G[i], *pair)


class Algorithm3(Algorithm2):
    """The convergent variant: no momentum, A inverted at every step, Algorithm 4 (H = I in Algorithm 1)."""

    def step(self, x, target):
        """Lines 4-16."""
        if self.H_A is None:
            self.start([x])
        a, h, Dh = self.pass_over(x, target)
        for i in range(len(self.W)):
            pairs = zip(Dh[i].flatten(0, 1), a[i].flatten(0, 1), strict=True)
            DW = sum(torch.outer(D, v) for D, v in pairs) / len(x) + self.decayed(i, self.decay)
            self.W[i] = self.W[i] - self.decayed(i, self.decoupled)
            self.W[i] = self.W[i] - self.lr * self.H_G[i] @ DW @ self.H_A[i]
        _, h_new, Dh_new = self.pass_over(x, target)
        self.start_from(a)
        for i in range(len(self.W)):
            self.s_G[i] = self.beta * self.s_G[i] + (1 - self.beta) * (h_new[i] - h[i]).mean((0, 1))
            self.y_G[i] = self.beta * self.y_G[i] + (1 - self.beta) * (Dh_new[i] - Dh[i]).mean((0, 1))
            s, y = damped(self.s_G[i], self.y_G[i], self.y_G[i], self.mu1, self.lam)
            if s @ y > 0:
                self.pairs[i] = [*self.pairs[i], (s, y)][-self.history :]
            self.H_G[i] = torch.eye(len(s), dtype=s.dtype)
            for pair in self.pairs[i]:
                self.H_G[i] = bfgs(self.H_G[i], *pair)


class Algorithm5(Algorithm2):
    """KFAC; the labels sampled in each extra pass are given, and T is the inversion interval."""

    def __init__(self, net, loss, lr, damping, beta, weight_decay, T):
        super().__init__(net, loss, lr, damping, beta, 0.0, weight_decay)
        self.T, self.k, self.Omega, self.Gamma, self.H_Omega, self.H_Gamma = T, 0, None, None, None, None

    def start(self, batches):
        """Line 1, from pairs of inputs and sampled labels."""
        passes = [self.pass_over(x, sampled) for x, sampled in batches]
        a = [torch.cat(of) for of in zip(*(a for a, _, _ in passes), strict=True)]
        Dh = [torch.cat(of) for of in zip(*(Dh for _, _, Dh in passes), strict=True)]
        self.Omega = [second_moment(at) for at in a]
        self.Gamma = [gamma(D) for D in Dh]
        self.invert()

    def invert(self):
        """Line 14."""
        regular = [
            [M + self.lam * torch.eye(len(M), dtype=M.dtype) for M in of] for of in (self.Omega, self.Gamma)
        ]
        self.H_Omega, self.H_Gamma = ([torch.linalg.inv(M) for M in of] for of in regular)

    def step(self, x, target, sampled, sampled_at_start=None):
        """Lines 4-16."""
        self.k += 1
        if self.Omega is None:
            self.start([(x, sampled_at_start)])
        a, _, Dh = self.pass_over(x, target)
        for i in range(len(self.W)):
            pairs = zip(Dh[i].flatten(0, 1), a[i].flatten(0, 1), strict=True)
            DW = sum(torch.outer(D, v) for D, v in pairs) / len(x) + self.decayed(i, self.decay)
            self.average[i] = self.beta * self.average[i] + (1 - self.beta) * DW
            self.W[i] = self.W[i] - self.lr * self.H_Gamma[i] @ self.average[i] @ self.H_Omega[i]
        _, _, Dh = self.pass_over(x, sampled)
        for i in range(len(self.W)):
            self.Omega[i] = self.beta * self.Omega[i] + (1 - self.beta) * second_moment(a[i])
            self.Gamma[i] = self.beta * self.Gamma[i] + (1 - self.beta) * gamma(Dh[i])
        if self.k % self.T == 0:
            self.invert()


def gamma(Dh):
    """E_n of the mean over locations of Dh_t Dh_tᵀ."""
    return sum(torch.outer(D, D) for Dn in Dh for D in Dn) / (Dh.shape[0] * Dh.shape[1])


class WithoutRate(Algorithm2):
    """The method without a learning rate: steps are taken with ``W``, and ``x`` are their averages.

    ``lr`` is the factor that a schedule sets.
    """

    POLYNOMIALS = (
        (8.2987, -24.4305, 18.0903),
        (3.9152, -2.9211, 0.5592),
        (3.1746, -2.3804, 0.4978),
        (2.1895, -1.5672, 0.4079),
    )

    def __init__(self, net, loss, weight_decay=0.03, beta=0.9, interval=40):
        super().__init__(net, loss, 1.0, 1.0, beta, 0.0, 0.0)
        self.shrinkage = weight_decay
        self.interval, self.x = interval, [W.clone() for W in self.W]
        self.fall, self.last_lr, self.frozen = 1.0, 0.0, False
        self.A = self.lam = None

    def start_from(self, inputs):
        """A of the first batch, and λ_A: a hundredth of its norm, more where it is singular."""
        self.A = [second_moment(self.some(at)) for at in inputs]
        C = [len(A) for A in self.A]
        vectors = [len(at) * len(at[0]) for at in inputs]
        self.lam = [0.01 * A.norm() * max(1, c / n) for A, c, n in zip(self.A, C, vectors, strict=True)]

    @staticmethod
    def some(at):
        """The data that A is taken of."""
        return at[:: max(1, min(8, at.shape[:2].numel() // (10 * at.shape[-1])))]

    def root(self, i):
        """(A + λ_A I)^(−½), as the last two polynomials have it of singular values up to 1.8377."""
        values, vectors = torch.linalg.eigh(self.A[i] + self.lam[i] * torch.eye(len(self.A[i])))
        start = x = 1.8377 * (values / values.norm()).sqrt()
        for a, b, c in self.POLYNOMIALS[2:]:
            x = a * x + b * x**3 + c * x**5
        return vectors @ torch.diag(x / start * 1.8377 / values.norm().sqrt()) @ vectors.T

    def even(self, X):
        """X with the polynomials applied to its singular values, and norm 1."""
        U, values, V = torch.linalg.svd(X, full_matrices=False)
        values = values / (values**4).sum() ** 0.25
        for a, b, c in self.POLYNOMIALS:
            values = a * values + b * values**3 + c * values**5
        return U @ torch.diag(values / values.norm()) @ V

    def step(self, x, target):
        """One pass, a step of W, x after it, and A at every so manyth step, of three gaps one longer."""
        a, _, Dh = self.pass_over(x, target)
        if self.A is None:
            self.start_from(a)
        k, self.steps = self.steps, self.steps + 1
        self.frozen |= self.lr < self.last_lr
        self.last_lr = self.lr
        if not self.frozen:
            self.fall = min(1.0, (100 / self.steps) ** (1 / 3))
        share = min(1.0, 16 / (self.steps + 15) / self.lr) if self.lr else 1.0
        for i, W in enumerate(self.W):
            pairs = zip(Dh[i].flatten(0, 1), a[i].flatten(0, 1), strict=True)
            DW = sum(torch.outer(D, v) for D, v in pairs) / len(x)
            self.average[i] = self.beta * self.average[i] + (1 - self.beta) * DW
            g = self.beta * self.average[i] + (1 - self.beta) * DW
            offsets = layers(self.net)[i].weight[0, 0].numel()
            rate = (0.06 if offsets > 1 else 0.04) * self.lr * self.fall
            P = math.sqrt(len(W) / 3) * self.even(g @ self.root(i))
            self.W[i] = W - rate * (self.shrinkage * W + P)
            self.x[i] = self.x[i] + share * (self.W[i] - self.x[i])
            if k % (3 * self.interval + 1) in (0, self.interval, 2 * self.interval):
                self.A[i] = 0.8 * self.A[i] + 0.2 * second_moment(self.some(a[i]))
