"""What an optimizer tells of itself."""

from kfqn.training import Training


def report(training: Training) -> dict[str, dict[str, float]]:
    """See `Kronecker.diagnostics`."""
    refused = max(group["progress"]["refused"] for group in training.groups.own())
    found: dict[str, dict[str, float]] = {"": {"refused": float(refused)}}
    for layer in training.groups.layers:
        state = training.states.of(layer)
        if not state:
            continue
        norms = {f"norm {key}": state[key].norm() for key in state if key.startswith("H_")}
        values = [state["step"].clamp(min=0), *state["counts"], *state["last"], *norms.values()]
        names = ["steps", *training.states.counted, "update", "ratio", *norms]
        found[layer.name] = dict(zip(names, [float(v) for v in values], strict=True))
    for rule, members in training.rules:
        found[""] |= rule.report(members)
    return found
