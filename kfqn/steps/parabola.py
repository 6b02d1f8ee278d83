"""``lr="auto"``: the step size that the losses before and after a step reveal; two passes know them.

Along a step ΔW = −ρ P the loss of its batch is about f₀ − ρ a + ½ ρ² c, with the descent a = −⟨∇f, ΔW⟩ / ρ
and the curvature c = 2 (f₁ − f₀ − ⟨∇f, ΔW⟩) / ρ². Both are divided by D = ⟨P, D̂W⟩, the squared length of
the averaged gradient in the metric H, so that they stay of one order while the loss falls, and averaged
over steps. The parabola of the averages is lowest at ρ = ā / c̄.

A batch judges the step that was made for it too well, the more so the fewer data it has for the weights: what
it gains beyond the rest is noise that the weights take up. Steps are kept so small that a batch gains no more
by its own step than all batches have gained in some steps of late.

Where the loss comes no lower any more, what is left are steps about in the noise of batches: they are halved.

Nothing here knows of networks or tensors; `kfqn.steps.automatic` takes the steps. All is invariant to the
scale of the loss, and to constants added to it.
"""

import math
from typing import NamedTuple

SHARE = 0.8  # of the way to the lowest point of the averaged parabola
DECAY = 0.9  # of the averages, a step; a judged step after a gap counts for more
LEAST_DECAY = 0.5
DOUBLING_STEPS = 3  # in which the rate may double at each judged step, until the parabola has limited it
GROWTH = 1.3  # later, a step; also that of shrinking
MOST_GROWTH, MOST_SHRINKING = 1.5, 4.0  # at one judged step, however many there were before it
LEAST_DESCENT = 0.1  # of a/D, where a usual decrease is asked for
OVERSHOT = 0.1  # of the promised decrease: with less, the step's own parabola bounds the next
REJECTED = 0.1  # times ρ D ā, the usual decrease: where the loss rises by more, the step is taken back
CUT = 0.1  # the most that a rejected step shrinks the rate by
UNDONE = 0.3  # a step that the next batch shows to be wrong shrinks it by this
NOISE = 5.0  # times the usual distance of a batch's loss from their average: far above
USUAL = 5  # losses until that is known
TRUSTED = 0.6  # share of their sizes, all added up, that layers move as far as the parabola says
LARGEST = 1.2  # and that they never move by more than
FIRST = 0.2  # of what is trusted is the first step
GAIN = 20  # a step may lower its own batch's loss by what losses come down in so many steps,
GAIN_LATER = 0.2  # and in this share of the steps so far,
GAIN_IN_NOISE = 0.5  # or by so many times the noise, if that is more
RECENT = 0.8  # decay, a judged step, of what steps gain
LEAST_LEFT = 0.1  # of a step, however much it gains; the next may be a tenth of that
OLDER, NEWER = 1, 6  # averages of n losses whose weights are (1 + η)/(n + η) lag by n/(2 + η)
PATIENCE = 30  # batches: where the loss is no lower for longer, steps are halved
PROGRESS = 1.0  # times the noise, to speak of
CERTAINTY = 10.0  # so many times what noise leaves uncertain would usual progress be while patience lasts
LEAST = 0.01  # of the steps that the losses ask for is always taken
LEAST_REACH = 1e-6  # share of their sizes, all added up, below which no step is looked for: it is rounding
MOST_REACH = 4.0  # nor above; what is beyond `LARGEST` is not moved by
REFUSED = 3  # batches in a row that are not finite show that the step before them went wrong
WITHOUT_LOSSES = 0.03  # share of a usual initialisation's norm that layers move by where losses do not judge
FORGOTTEN = 0.95  # of how far a layer's direction reaches is left a step later


def within_bounds(share: float, layers: int) -> float:
    """By what share of its size each layer moves, where the parabola asks for ``share`` (M6).

    Beyond what is trusted the geometric mean of both: what relative changes of ``layers`` layers do to the
    output multiplies, which one batch may not show, but a lowest point that is far away is no accident.
    """
    trusted = TRUSTED / layers
    return share if share <= trusted else min(math.sqrt(trusted * share), LARGEST / layers)


def bounded(share: float, layers: int) -> float:
    """The share that the parabola asks for, kept from zero and infinity however it came to be (M5)."""
    return min(max(share, LEAST_REACH / layers), MOST_REACH / layers)


def left_by_gain(search: "Search", reach: float) -> float:
    """How much is left of a step of ρ D = ``reach``, so that its own batch gains no more than all do (M7)."""
    return max(LEAST_LEFT, search.gain_bound / reach) if 0 < search.gain_bound < reach else 1.0


class Search(NamedTuple):
    """What is known of the step size; kept in ``param_groups``, so in plain numbers."""

    rate: float = 0.0  # α; 0 before the first step
    descent: float = 0.0  # sums over judged steps of a/D and c/D, with decaying weights,
    curvature: float = 0.0
    weight: float = 0.0  # and the sum of these
    steps: int = 0
    steps_since_trial: int = 0  # steps since the last that was judged, this one included
    limited: bool = False  # whether anything but the largest growth ever decided
    loss: float = 0.0  # average over batches, the last weighing most
    noise: float = 0.0  # and the average distance from it
    losses: int = 0
    unverified: bool = False  # whether the last step was not judged, and can be undone
    force_trial: bool = False  # whether the next step has to be judged, whatever the cadence
    rejected: int = 0  # steps taken back so far
    trend: float = 0.0  # of the losses, averaged over as many batches as patience lasts,
    start: float = 0.0  # what it was once the first had passed, or at the last halving,
    lowest: float = 0.0  # the lowest it has been since,
    plateau: int = 0  # and how many batches ago
    plateau_factor: float = 1.0  # of the steps, after halvings
    gains: float = 0.0  # sums over judged steps of what their own batch gained, others' part aside,
    lengths: float = 0.0  # and of ρ D, with decaying weights
    older: float = 0.0  # averages of the losses that lag by a third
    newer: float = 0.0  # and by an eighth of their number
    refused: int = 0  # batches in a row that were not finite
    gain_bound: float = 0.0  # ρ D of a step that would gain as much as all of late; 0: no bound


class Sample(NamedTuple):
    """A step that has been judged: ρ, D, the slopes ⟨∇f, ΔW⟩, and the losses f₀ and f₁.

    ρ is ``factor``, what schedulers make of the rate, times ``rate``, of which bounds may have left less.
    ``slope`` is that of the layers that moved with the automatic rate, ``regularised`` the same with L2, and
    ``slope_of_all`` that of everything that moved. ``resolution`` is the smallest difference of losses that
    counts.
    """

    rate: float
    factor: float
    D: float
    slope: float
    regularised: float
    slope_of_all: float
    before: float
    after: float
    resolution: float


def judged(search: Search, sample: Sample) -> tuple[Search, float]:
    """What the search knows after a judged step, and what share of the step stays; below 1 it is rejected."""
    rate, rho = sample.rate, sample.rate * sample.factor
    curved = sample.after - sample.before - sample.slope_of_all
    if not math.isfinite(curved):
        return _rejected(search, rate * CUT), 0.0
    foreign = abs(sample.slope_of_all - sample.slope) > abs(sample.slope)
    if foreign:
        curved = 0.0  # other parameters weigh more, and nobody can tell whose curvature it is
    change = sample.slope + curved  # of the loss, without what other parameters contribute
    if not (rho > 0 and sample.D > 0):
        return search._replace(steps_since_trial=0, force_trial=False), 1.0
    a = -sample.regularised / rho / sample.D  # (M8)
    c = 2 * curved / rho**2 / sample.D if abs(curved) > sample.resolution else 0.0
    usual = search.descent / search.weight if search.weight else max(a, 0.0)
    if not foreign and change > max(REJECTED * rho * sample.D * max(usual, LEAST_DESCENT), sample.resolution):
        lowest = SHARE * max(usual, a) / c if c > 0 else 0.0  # (M12)
        share = -sample.slope / (2 * curved) if curved > 0 else 0.0
        return _rejected(search, max(rate * CUT, min(rate / 2, lowest))), min(0.5, max(0.0, share))
    decay = max(LEAST_DECAY, DECAY**search.steps_since_trial)  # (M9)
    search = search._replace(
        descent=decay * search.descent + (1 - decay) * a,
        curvature=decay * search.curvature + (1 - decay) * c,
        weight=decay * search.weight + (1 - decay),
    )
    wanted, growth = _wanted(search, rate)
    limited = search.limited or wanted < rate * growth
    overshot = sample.slope < 0 and change > OVERSHOT * sample.slope  # (M11)
    if overshot and c > 0:
        wanted = min(wanted, max(rate / 2, SHARE * a / c))
    if change > 0:
        wanted = min(wanted, rate / GROWTH)
    search = search._replace(
        gains=RECENT * search.gains - (1 - RECENT) * change,
        lengths=RECENT * search.lengths + (1 - RECENT) * rho * sample.D,
    )
    return search._replace(
        rate=wanted, limited=limited, steps_since_trial=0, force_trial=False, gain_bound=_gain_bound(search)
    ), 1.0


def _gain_bound(search: Search) -> float:
    """ρ D of a step whose own batch would gain as much as all batches have of late (M13)."""
    if search.losses < USUAL or not search.gains > 0:
        return 0.0
    passed = search.losses * (1 / (2 + OLDER) - 1 / (2 + NEWER))  # between the two averages
    progress = (search.older - search.newer) / passed * (GAIN + GAIN_LATER * search.losses)
    return max(progress, GAIN_IN_NOISE * search.noise) * search.lengths / search.gains


def _wanted(search: Search, rate: float) -> tuple[float, float]:
    """The next rate by the averaged parabola, within how fast it may change, and its largest growth (M10)."""
    doubles = not search.limited and search.steps <= DOUBLING_STEPS
    growth = 2.0 if doubles else min(GROWTH**search.steps_since_trial, MOST_GROWTH)
    least = rate / min(GROWTH**search.steps_since_trial, MOST_SHRINKING)
    if search.descent <= 0:
        return least, growth
    if search.curvature <= 0:
        return rate * growth, growth
    return min(max(SHARE * search.descent / search.curvature, least), rate * growth), growth


def _rejected(search: Search, rate: float) -> Search:
    return search._replace(
        rate=rate,
        steps_since_trial=0,
        limited=True,
        unverified=False,
        force_trial=True,
        rejected=search.rejected + 1,
    )


def far_above(search: Search, loss: float) -> bool:
    """Whether the loss of a batch shows that the step before it, which was not judged, went wrong (M14)."""
    return search.unverified and search.losses >= USUAL and loss - search.loss > NOISE * search.noise > 0


def undone(search: Search) -> Search:
    """After the step before has been taken back."""
    return _rejected(search, search.rate * UNDONE)


def with_loss(search: Search, loss: float) -> Search:
    """After a batch with this loss; one that is not finite is no measure of what is usual."""
    if not math.isfinite(loss):
        return search
    n, distance = search.losses + 1, abs(loss - search.loss)
    search = search._replace(
        losses=n,
        older=search.older + (loss - search.older) * (1 + OLDER) / (n + OLDER),
        newer=search.newer + (loss - search.newer) * (1 + NEWER) / (n + NEWER),
    )
    if n == 1:
        return search._replace(loss=loss)
    noise = distance if n == 2 else DECAY * search.noise + (1 - DECAY) * distance
    return _patient(search._replace(loss=0.7 * search.loss + 0.3 * loss, noise=noise), loss)


def _patient(search: Search, loss: float) -> Search:
    """Halve the steps where the loss has not become lower for too long, in the noise of batches (M15).

    No horizon has to be known. In p of n batches the progress Δ since the last halving would go on by Δ p/n,
    and an average over p is known to σ/√p; patience is the p at which the first is many times the second.
    Without progress to speak of nothing is halved: neither on a first plateau, nor where it did not pay.
    """
    n, progress = search.losses - PATIENCE, search.start - search.lowest
    if n <= PATIENCE:  # the first losses may be far off, and one alone says little
        trend = search.trend + (loss - search.trend) / max(1, n)
        return search._replace(trend=trend, start=trend, lowest=trend)
    patience = math.inf
    if progress > PROGRESS * search.noise:
        patience = max(PATIENCE, (CERTAINTY * search.noise * n / progress) ** (2 / 3))
    trend = search.trend + (loss - search.trend) / min(n + 1, patience)
    if trend < search.lowest - search.noise / math.sqrt(patience):
        return search._replace(trend=trend, lowest=trend, plateau=0)
    if search.plateau < patience:
        return search._replace(trend=trend, plateau=search.plateau + 1)
    return search._replace(
        trend=trend,
        start=trend,
        lowest=trend,
        plateau=0,
        plateau_factor=max(LEAST, search.plateau_factor / 2),
    )


def stepped(search: Search, judged: bool) -> Search:
    """After a step has been taken, that is to be judged or not."""
    return search._replace(
        steps=search.steps + 1, steps_since_trial=search.steps_since_trial + 1, unverified=not judged
    )
