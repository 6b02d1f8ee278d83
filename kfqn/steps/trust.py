"""Whether losses can judge steps: what is checked, how trust in them is lost, and what is said then (M21).

A judged step compares the loss of its batch before and after with the slope ⟨∇f, ΔW⟩ of the gradients that
were stepped with. That asks three things of a training loop: the same batch gives the same loss, the loss
changes as the gradients say, and the batches are of one function. So at the first step, and
ever more rarely later, a second pass is run on the way, of closures beside the one at the end of the step and
in other loops in its place, to see:

- at its start, where the loss has to be the one of the first pass;
- at an eighth of it, where the loss has changed by an eighth of ``ratio`` times the slope. The ratio is 1;
  another one, of gradients that were clipped or of a part of the loss that is returned, counts for
  every slope until the next check.

Where losses do not fit, or most steps are taken back, or the losses of batches rise above where they began
although each step lowered its own, trust is lost for good: steps are then of a size that needs no losses
(`kfqn.steps.automatic`).

Nothing here knows of networks or tensors.
"""

import math
from typing import NamedTuple

ON_THE_WAY = 0.125  # of a step, where its slope is checked: what curvature adds there is small
LONGEST_WAIT = 32  # second passes between checks: doubled while nothing is found, 1 while something is
SAME = 1e-4  # of a loss is the difference between two of the same batch that is let pass
SHARE_OF_SLOPE = 0.25  # of what the step promises is let pass too
FITTING = 1.2  # a ratio within this factor of 1 is 1
STEADY = 5.0  # a ratio within this factor of the last one confirms it
DOUBTS = 2  # checks in a row that confirm nothing cost the trust
REJECTED = 8  # rejected steps, less those that were not
MISSED = 2  # steps in a row of which nobody ran the second pass that was due
FIRST_LOSSES = 5  # batches whose mean loss is where losses began
ABOVE = 5.0  # times the uncertainty of both averages: significantly above where losses began
LOSSES = 25  # until that is asked
FALLEN = 10.0  # times the size of the first losses, from where they began: there is no floor


class Trust(NamedTuple):
    """What is known of how far losses can be believed; kept in ``param_groups``, so in plain numbers."""

    lost: str = ""  # why, in a word: a key of `REASONS`
    ratio: float = 1.0  # of what losses do to what slopes say
    checks: int = 0  # done so far; every second one is of the slope, all where the ratio is not 1
    wait: int = 0  # second passes until the next
    fitting: int = 0  # checks in a row that found nothing
    varies: bool = False  # whether the ratio ever was another than 1
    doubts: int = 0
    rejected: int = 0
    missed: int = 0
    losses: int = 0
    first: float = 0.0  # mean of the first losses
    spread: float = 0.0  # and their mean distance from it
    newer: float = 0.0  # and of all, late ones weighing most
    noise: float = 0.0  # mean distance of a loss from that, of those in which trust is not asked for


def point(trust: Trust) -> float:
    """How far along the step the next second pass is to be run: 1 judges it, less is a check."""
    if trust.wait > 0:
        return 1.0
    return ON_THE_WAY if trust.checks % 2 or trust.varies else 0.0


def passed(trust: Trust) -> Trust:
    """After a second pass that judged its step."""
    return trust._replace(wait=trust.wait - 1, missed=0)


def checked(trust: Trust, at: float, change: float, slope: float, loss: float, resolution: float) -> Trust:
    """After a second pass at ``at`` < 1 of the step, where the loss had changed by ``change`` to ``loss``.

    ``slope`` is that of the whole step, of all that moved; below ``resolution`` losses tell nothing.
    """
    trust = trust._replace(checks=trust.checks + 1, missed=0)
    if at == 0:
        allowed = max(SAME * abs(loss), SHARE_OF_SLOPE * abs(trust.ratio * slope), resolution)
        return _next(trust if abs(change) <= allowed else trust._replace(lost="same"))
    promised = at * slope
    if not math.isfinite(change) or max(abs(promised), abs(change)) <= 4 * resolution:
        return _next(trust)
    found = change / promised if promised else math.inf
    if not 0 < found < math.inf:
        return _next(_doubted(trust))
    fits = max(found / trust.ratio, trust.ratio / found) < STEADY
    trust = trust._replace(ratio=1.0 if max(found, 1 / found) < FITTING else found)
    return _next(trust._replace(doubts=0) if fits else _doubted(trust))


def _doubted(trust: Trust) -> Trust:
    doubts = trust.doubts + 1
    return trust._replace(doubts=doubts, lost="slope" if doubts >= DOUBTS else "")


def _next(trust: Trust) -> Trust:
    """With the time of the next check: clipping, once seen, comes and goes with the size of gradients."""
    varies = trust.varies or trust.ratio != 1
    fitting = 0 if trust.doubts or trust.ratio != 1 else trust.fitting + 1
    wait = min(LONGEST_WAIT, 2 ** (fitting // 2 if varies else fitting))
    return trust._replace(fitting=fitting, varies=varies, wait=wait if trust.checks >= 2 else 0)


def with_verdict(trust: Trust, rejected: bool) -> Trust:
    """After a judged step was taken back, or not; rejected twice, a check is due."""
    count = trust.rejected + 1 if rejected else max(0, trust.rejected - 1)
    trust = trust._replace(rejected=count)
    if count >= REJECTED:
        return trust._replace(lost="rejected")
    return trust._replace(wait=min(trust.wait, 0)) if rejected and count >= 2 else trust


def unserved(trust: Trust) -> Trust:
    """After a step whose second pass was due and never run."""
    missed = trust.missed + 1
    return trust._replace(missed=missed, lost="missed" if missed >= MISSED else "")


def with_loss(trust: Trust, loss: float) -> Trust:
    """After a batch with this loss, before its step; one that is not finite says nothing here."""
    if trust.lost or not math.isfinite(loss):
        return trust
    n = trust.losses + 1
    noise = trust.noise
    if 1 < n <= LOSSES:  # later they may rise, and the noise with them
        noise += (abs(loss - trust.newer) - noise) * 2 / (n + 1)
    newer = trust.newer + (loss - trust.newer) * min(1.0, 7 / (n + 6))
    first, spread = trust.first, trust.spread
    if n <= FIRST_LOSSES:
        first += (loss - first) / n
        spread += (abs(loss - first) - spread) / n
    trust = trust._replace(losses=n, first=first, spread=spread, newer=newer, noise=noise)
    if n > FIRST_LOSSES and first - newer > FALLEN * (abs(first) + spread):
        return trust._replace(lost="falling")
    above = newer - first > ABOVE * noise * math.sqrt(1 / FIRST_LOSSES + 1 / n) > 0
    return trust._replace(lost="rising") if n >= LOSSES and above else trust


_THEN = (
    "From now on every layer moves by {share:.0%} of the size of a usual initialisation times its group's "
    "'lr', which any scheduler may change, and there are no second passes"
)
REASONS = {
    "same": "the loss of the same batch came out different when it was computed again with no step between, "
    "so losses cannot judge steps. "
    f"{_THEN}. Likely causes: random numbers that are not torch's or not global, a batch drawn inside the "
    "closure, state that changes with every call; move them out of the closure.",
    "slope": "the loss does not change as its gradients say, so losses cannot judge steps. "
    f"{_THEN}. Likely causes: the loss that is returned or told is not the one that backward was called on, "
    "or gradients are changed between backward and step.",
    "rejected": "the loss of the same batch rose after nearly every step of late, however small, so losses "
    f"cannot judge steps. {_THEN}. Likely causes: the second pass does not do what the first did, or the "
    "gradients do not belong to the loss.",
    "falling": "the losses of batches have fallen by many times their size and have no floor, so losses "
    f"cannot judge steps. {_THEN}. Likely cause: a loss that is not one function, as where two networks "
    "train against each other.",
    "rising": "the losses of batches have risen above where they began although each step lowered the loss "
    f"of its own batch, so losses cannot judge steps. {_THEN}. Likely causes: very small batches, or a loss "
    "that is not one function, as where two networks train against each other.",
    "missed": "step() was called again without a second pass over the batch of the last step, so no losses "
    f"are known to judge steps by, and of curvature only that of the inputs is learnt. {_THEN}. To let "
    "both be found: 'with optimizer.second_pass(loss) as again: again.loss = loss_fn(model(x), y); "
    "again.loss.backward()' after each step, or give step a closure.",
}
