"""Systems from outside the training simulator whose truth is known: what people's data look like.

Each `System` draws rows under any intervention, knows E[Y | do] by a large sample, and makes the
first data set of a campaign. `SYSTEMS` holds them by name. numpy only.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class System:
    name: str
    names: tuple[str, ...]
    equations: Callable
    """(rng, n, put), in causal order; put(index, values) remembers and returns what is in force."""
    target: str = "Y"
    objective: str = "min"
    num_obs: int = 200
    per_variable: int = 2
    bounds: dict = field(default_factory=dict)
    """variable -> (low, high); empty: what the observations span."""
    settable: tuple[str, ...] = ()
    """Empty: all but the target."""

    def sample(self, rng, n, do=None):
        """`n` rows `[n, vars]` under do, a dict from name to value."""
        fixed, columns = {self.names.index(k): v for k, v in (do or {}).items()}, {}

        def put(index, values):
            values = (
                np.full(n, float(fixed[index]))
                if index in fixed
                else np.broadcast_to(np.asarray(values, float), (n,)).copy()
            )
            columns[index] = values
            return values

        self.equations(rng, n, put)
        return np.stack([columns[i] for i in range(len(self.names))], 1)

    def mean(self, do=None, n=20_000):
        """E[target | do], the same noise at every call."""
        return float(
            self.sample(np.random.default_rng(12345), n, do)[
                :, self.names.index(self.target)
            ].mean()
        )

    def data(self, seed, num_obs=None, per_variable=None):
        """rows `[n, vars]`, the variable set in each row (-1: none), and the bounds."""
        rng = np.random.default_rng(seed)
        observed = self.sample(rng, self.num_obs if num_obs is None else num_obs)
        may = self.settable or tuple(n for n in self.names if n != self.target)
        bounds = {
            v: self.bounds.get(v, (float(observed[:, i].min()), float(observed[:, i].max())))
            for i, v in enumerate(self.names)
            if v in may
        }
        rows, which = [observed], [-1] * len(observed)
        for v, (low, high) in bounds.items():
            for _ in range(self.per_variable if per_variable is None else per_variable):
                rows.append(self.sample(rng, 1, {v: rng.uniform(low, high)}))
                which.append(self.names.index(v))
        return np.vstack(rows), np.array(which), bounds

    def best(self, bounds, points=41, n=4000):
        """The best single setting on a grid: (mean, variable, value).

        The variable is None if nothing beats doing nothing.
        """
        sign = 1.0 if self.objective == "min" else -1.0
        nothing = self.mean(None, n)
        found = [
            (sign * self.mean({v: x}, n), v, float(x))
            for v, (a, b) in bounds.items()
            for x in np.linspace(a, b, points)
        ]
        value, variable, x = min(found)
        spread = self.sample(np.random.default_rng(1), 2000)[:, self.names.index(self.target)].std()
        return (
            (sign * value, variable, x)
            if value < sign * nothing - 0.02 * spread
            else (nothing, None, None)
        )


SYSTEMS = {}


def system(names, **settings):
    """Decorator: a function (rng, n, put) becomes `SYSTEMS[its name]`.

    `variants` maps a suffix of the name to changed settings.
    """

    def register(equations):
        variants = settings.pop("variants", {})
        base = dict(names=tuple(names.split()), equations=equations, **settings)
        for suffix, changes in {"": {}, **variants}.items():
            name = equations.__name__ + suffix
            SYSTEMS[name] = System(name, **(base | changes))
        return equations

    return register


def normal(rng, n, scale=1.0):
    return rng.normal(0.0, scale, n)


@system(
    "A B Y D",
    variants={
        "_12_rows": dict(num_obs=12),
        "_12_rows_no_experiments": dict(num_obs=12, per_variable=0),
        "_3000_rows": dict(num_obs=3000),
    },
)
def chain(r, n, put):
    a = put(0, normal(r, n))
    b = put(1, 0.8 * a + normal(r, n, 0.6))
    put(2, -b + normal(r, n, 0.5))
    put(3, normal(r, n))


@system(
    "Z X Y D",
    variants={
        "_that_cannot_be_set": dict(settable=("X", "D"), bounds={"X": (-2, 2), "D": (-2, 2)})
    },
)
def observed_confounder(r, n, put):
    """X does nothing; Z moves both."""
    z = put(0, normal(r, n))
    put(1, z + normal(r, n, 0.5))
    put(2, 1.5 * z + normal(r, n, 0.5))
    put(3, normal(r, n))


@system(
    "X Y D E",
    variants={"_no_experiments": dict(per_variable=0), "_20_experiments": dict(per_variable=20)},
)
def hidden_confounder(r, n, put):
    """X does nothing; what nobody measures moves both."""
    u = normal(r, n)
    put(0, u + normal(r, n, 0.5))
    put(1, 1.5 * u + normal(r, n, 0.5))
    put(2, normal(r, n))
    put(3, normal(r, n))


@system("X Y C D")
def collider(r, n, put):
    x = put(0, normal(r, n))
    y = put(1, 0.8 * x + normal(r, n, 0.8))
    put(2, x + y + normal(r, n, 0.5))
    put(3, normal(r, n))


@system("X Y C1 C2 D")
def children(r, n, put):
    x = put(0, normal(r, n))
    y = put(1, -0.7 * x + normal(r, n, 0.7))
    put(2, 1.2 * y + normal(r, n, 0.3))
    put(3, -y + normal(r, n, 0.3))
    put(4, 0.5 * x + normal(r, n))


@system("Y C1 C2 D E", variants={"_no_experiments": dict(per_variable=0)})
def only_children(r, n, put):
    """Nothing moves Y."""
    y = put(0, normal(r, n))
    put(1, 1.2 * y + normal(r, n, 0.3))
    put(2, -y + normal(r, n, 0.3))
    put(3, normal(r, n))
    put(4, normal(r, n))


@system("Y A B C D E", variants={"_12_rows": dict(num_obs=12)})
def unrelated(r, n, put):
    """Nothing moves Y."""
    for i in range(6):
        put(i, normal(r, n))


@system("X W Y D")
def interior_optimum(r, n, put):
    x = put(0, normal(r, n))
    w = put(1, normal(r, n))
    put(2, (x - 0.7) ** 2 + 0.4 * w + normal(r, n, 0.5))
    put(3, normal(r, n))


@system("X Y D E")
def several_valleys(r, n, put):
    x = put(0, normal(r, n))
    put(1, np.sin(4 * x) + normal(r, n, 0.3))
    put(2, normal(r, n))
    put(3, normal(r, n))


def plant(optimum, quiet):
    """A process held at its set point with small variation, and experiments that leave it far."""

    def equations(r, n, put):
        t = put(0, 60 + quiet * normal(r, n))
        f = put(1, 100 + 2 * quiet * normal(r, n))
        put(2, 7 + 0.1 * normal(r, n))
        put(3, 70 - 0.05 * (t - optimum) ** 2 + 0.05 * (f - 100) + normal(r, n, 0.5))

    return equations


for _quiet in (0.2, 1.0, 5.0):
    for _per, _suffix in ((2, ""), (10, "_10_experiments")):
        _name = f"plant_quiet_{_quiet}{_suffix}"
        SYSTEMS[_name] = System(
            _name,
            ("T", "F", "pH", "yield"),
            plant(70.0, _quiet),
            "yield",
            "max",
            100,
            _per,
            {"T": (40, 90), "F": (50, 150), "pH": (6.5, 7.5)},
        )


@system(
    "A B Y D",
    bounds={"A": (-30, 30), "B": (-30, 30), "D": (-30, 30)},
    variants={"_10_experiments": dict(per_variable=10)},
)
def bounds_ten_times_the_data(r, n, put):
    chain(r, n, put)


@system("A B Y D", bounds={"A": (-0.01, 0.01), "B": (-0.01, 0.01), "D": (-0.01, 0.01)})
def narrow_bounds(r, n, put):
    chain(r, n, put)


@system("A B Y D")
def units_of_1e6_and_1e_minus_6(r, n, put):
    a = put(0, 1e6 * normal(r, n))
    b = put(1, 1e-6 * (0.8 * a / 1e6 + normal(r, n, 0.6)))
    put(2, 1e-6 * (-1e6 * b + normal(r, n, 0.5)))
    put(3, 1e6 * normal(r, n))


@system("A B C Y D", objective="max")
def moles_and_pascals(r, n, put):
    """A level of 101,325 that varies by .5, a concentration of 1e-9."""
    a = put(0, 101_325 + 0.5 * normal(r, n))
    b = put(1, 1e-9 * (3 + normal(r, n)))
    put(2, 20 + normal(r, n))
    put(3, 50 + 2 * (a - 101_325) / 0.5 + 3 * b / 1e-9 + normal(r, n))
    put(4, normal(r, n))


@system("C F Y D")
def celsius_and_fahrenheit(r, n, put):
    c = put(0, 60 + 10 * normal(r, n))
    put(1, 1.8 * c + 32)
    put(2, -0.1 * c + normal(r, n, 0.5))
    put(3, normal(r, n))


@system("load rpm Y D", objective="max")
def sensor_beside_its_actuator(r, n, put):
    """rpm is load with a little noise, almost deterministic; only one of the two moves Y."""
    load = put(0, r.uniform(0, 1, n))
    rpm = put(1, 3000 * load + normal(r, n, 15))
    put(2, 0.002 * rpm + normal(r, n, 0.4))
    put(3, normal(r, n))


@system("X Y D E", variants={"_no_experiments": dict(per_variable=0)})
def feedback(r, n, put):
    """X and Y move each other; solved to equilibrium. D follows Y."""
    noise = normal(r, n), normal(r, n)
    x, y = np.zeros(n), np.zeros(n)
    for _ in range(80):
        x = put(0, 0.9 * y + noise[0])
        y = put(1, -0.7 * x + noise[1])
    put(2, 0.8 * y + normal(r, n, 0.5))
    put(3, normal(r, n))


@system("X Y D E")
def heavy_tailed_causes(r, n, put):
    x = put(0, np.clip(r.standard_t(2, n), -40, 40))
    put(1, -x + normal(r, n))
    put(2, np.clip(r.standard_t(2, n), -40, 40))
    put(3, normal(r, n))


@system("A B Y D", bounds={"A": (0, 1), "B": (0, 1), "D": (0, 1)})
def switches(r, n, put):
    """Settings that are 0 or 1."""
    a = put(0, (r.random(n) < 0.5) * 1.0)
    put(1, np.where(r.random(n) < 0.8, a, 1 - a))
    put(2, 1 - a + normal(r, n, 0.4))
    put(3, (r.random(n) < 0.1) * 1.0)


def many(num_vars, num_rows):
    def equations(r, n, put):
        x = [put(i, normal(r, n)) for i in range(1, num_vars)]
        put(0, -x[0] + normal(r, n, 0.5))

    names = ("Y", *(f"v{i}" for i in range(1, num_vars)))
    name = f"one_cause_among_{num_vars - 1}_{num_rows}_rows"
    SYSTEMS[name] = System(
        name, names, equations, num_obs=num_rows, bounds={v: (-2, 2) for v in names[1:]}
    )


for _vars, _rows in ((5, 1000), (5, 20_000), (20, 200), (20, 1000), (20, 20_000), (64, 1000)):
    many(_vars, _rows)
