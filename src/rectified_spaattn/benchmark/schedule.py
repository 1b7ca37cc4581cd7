"""From the time of a few layers to that of a whole model, and from forwards to a denoising run."""

from typing import NamedTuple


class Line(NamedTuple):
    """Seconds of a forward against the number of units: constant + unit * units."""

    constant: float
    unit: float

    def at(self, units: float) -> float:
        return self.constant + self.unit * units


def line(low: float, high: float, low_units: int, high_units: int) -> Line:
    """Through the times of a forward with few and with more units."""
    if not 0 < low_units < high_units:
        raise ValueError(f"units: got {low_units} and {high_units}; allowed: two numbers above 0, the second larger.")
    unit = (high - low) / (high_units - low_units)
    return Line(low - unit * low_units, unit)


def mixed_forward(sparse: Line, dense: Line, units: int, dense_layers: int, layers_a_unit: int) -> float:
    """A forward in which `dense_layers` layers are dense and the others sparse.

    Raises ValueError where one unit is several layers: then the time of a single layer is not known.
    """
    if dense_layers and layers_a_unit > 1:
        raise ValueError(f"dense_layers: got {dense_layers} where a unit has {layers_a_unit} layers; allowed: none.")
    return sparse.at(units) + dense_layers * (dense.unit - sparse.unit)


class Schedule(NamedTuple):
    """steps: of the run; computed: those that no cache skips; dense: those with full attention, all of them computed.

    calls: forwards a step.
    """

    steps: int
    computed: int
    dense: int
    calls: int

    def seconds(self, dense_forward: float, sparse_forward: float) -> float:
        return self.calls * (self.dense * dense_forward + (self.computed - self.dense) * sparse_forward)


def schedule(steps: int, computed: int, dense: int, calls: int) -> Schedule:
    """Raises ValueError unless dense <= computed <= steps."""
    if steps < 1:
        raise ValueError(f"steps: got {steps}; allowed: 1 or more.")
    if not dense <= computed <= steps:
        raise ValueError(
            f"computed steps: got {computed}; allowed: {dense} to {steps}: the dense steps at the start are computed, "
            "and no more than there are."
        )
    return Schedule(steps, computed, dense, calls)


def most_computed(plan: Schedule, dense_forward: float, sparse_forward: float, allowed: float) -> int | None:
    """Most computed steps with which a run takes `allowed` seconds or less; None where the dense steps take longer."""
    fitting = [n for n in range(plan.dense, plan.steps + 1) if n]
    fitting = [n for n in fitting if plan._replace(computed=n).seconds(dense_forward, sparse_forward) <= allowed]
    return max(fitting, default=None)
