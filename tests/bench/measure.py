"""What every bench has in common: rows of the table, medians of paired runs, spread."""

import dataclasses
import statistics


def interleaved(rounds, *sides):
    """What each of `sides` (functions without arguments) returns, `rounds` times: a list a side. Odd rounds go backwards,
    so that what drifts touches all alike."""
    found = [[] for _ in sides]
    for turn in range(rounds):
        order = list(enumerate(sides))
        for index, side in order if turn % 2 == 0 else reversed(order):
            found[index].append(side())
    return found


def median(values):
    return statistics.median(values)


def spread(values):
    """The quartiles, as "low to high"."""
    if len(values) < 2:
        return shown(values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{shown(low)} to {shown(high)}"


def shown(value):
    """Three significant figures, without an exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


@dataclasses.dataclass
class Row:
    """A line of the table. ours, theirs: with unit, as text. ratio: the medians' quotient, the median of the quotients
    of each round, or a plain figure. limit: ("at most" | "at least", number) or None where nothing is asked."""

    what: str
    ours: str
    theirs: str
    figure: float
    unit: str = "x"
    quartiles: str = ""
    limit: tuple | None = None

    @property
    def met(self):
        if self.limit is None:
            return True
        word, number = self.limit
        return self.figure <= number if word == "at most" else self.figure >= number

    def cells(self):
        target = "" if self.limit is None else f"{self.limit[0]} {self.limit[1]:g} {self.unit}"
        mark = "" if self.met else " (missed)"
        return [self.what, self.ours, self.theirs, f"{shown(self.figure)} {self.unit}{mark}", self.quartiles, target]


HEADINGS = ["what", "ringmail", "compared with", "result", "quartiles", "to reach"]


def ratio(what, unit, ours, theirs, against, limit=None):
    """A row for two lists of figures that were taken in pairs."""
    quotients = [one / other for one, other in zip(ours, theirs, strict=True)]
    told = lambda values: f"{shown(median(values))} {unit}"  # noqa: E731
    return Row(what, told(ours), f"{told(theirs)} ({against})", median(quotients), "x", spread(quotients), limit)

