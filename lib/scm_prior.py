"""The distribution of causal models: random graphs and mechanisms, a target worth optimising."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lib.graphs import FAMILIES, between, draw, log_between, one_of, pick, sample_graph, whole
from lib.scm import Intervention, antithetic_normal, value_grid
from lib.synthetic import MAX_HIDDEN, MECHANISMS, NOISES, SETTLED, SyntheticSCM, index_of


NUM_HIDDEN = 16  # hidden units per mechanism: enough for a varied function of up to a few parents
NUM_CALIBRATION = 256  # rows behind each variable's standardisation
KINDS = 0x6B696E64  # folded into a key for what is special about a model or a data set
# of a quiet model, by how much its lengthscales are longer: who sets ranges far outside what was
# observed expects one optimum there, not ten
QUIET_LENGTH = 3.0
QUIET_NOISE = 0.03, 0.35  # of a quiet model, as a share of what its noise would be
# of a tight model: the same of a variable that is nearly determined, and how many of them there are
TIGHT_NOISE, TIGHT_SHARE = 0.05, 0.3
FEEDBACK_WEIGHT = 0.5  # of what an edge that goes back in the order would weigh otherwise
MAX_EFFECT = 100.0  # of feedback, in deviations: beyond it nothing settles


@dataclass(frozen=True)
class SCMPrior:
    """What `sample_scm` draws from. Values are in observational standard deviations of each
    variable, from its observational mean.
    """

    max_vars: int = 8
    """Size of the bucket that every model is padded to."""
    min_size: int = 3
    """Fewest variables."""
    max_size: int = 8
    """Most variables."""
    families: tuple[str, ...] = ("erdos_renyi", "scale_free", "chain", "fork", "collider")
    """Graph families, drawn with equal probability."""
    mechanisms: tuple[str, ...] = ("linear", "fourier")
    """Mechanism families, drawn with equal probability."""
    noises: tuple[str, ...] = ("gaussian",)
    """Kinds of noise, drawn with equal probability."""
    standardised: bool = True
    """Standardise every variable while it is generated (iSCM, arXiv 2406.11601); otherwise
    variances add up along the graph.
    """
    min_density: float = 0.15
    """Smallest edge probability of an Erdős–Rényi or layered graph."""
    max_density: float = 0.5
    """Largest edge probability of an Erdős–Rényi or layered graph."""
    min_noise: float = 0.3
    """Smallest noise scale, before standardisation."""
    max_noise: float = 3.0
    """Largest noise scale, before standardisation."""
    min_lengthscale: float = 0.4
    """Shortest lengthscale of a Fourier or MLP mechanism, in deviations of a parent."""
    max_lengthscale: float = 2.5
    """Longest lengthscale of a Fourier or MLP mechanism, in deviations of a parent."""
    min_range: float = 1.5
    """Shortest distance from the observational mean to an end of a range of intervention."""
    max_range: float = 4.0
    """Longest distance from the observational mean to an end of a range of intervention."""
    min_effect: float = 0.5
    """Standard deviations by which some intervention must lower the target, so that there is
    something to gain; 0 admits every variable as target.
    """

    hidden: float = 0.0
    """Share of models in which one or two variables are hidden."""
    quiet: float = 0.0
    """Share whose noise is small, so that ranges reach far outside what is observed; mechanisms are
    of any kind, and smoother.
    """
    inert: float = 0.0
    """Share in which nothing lowers the target by `min_effect`."""
    mixed: float = 0.0
    """Share of any graph family, each variable with a kind of mechanism and noise of its own."""
    tight: float = 0.0
    """Share in which one variable copies another and parents nearly determine some others."""
    feedback: float = 0.0
    """Share in which one effect acts back on its cause."""
    told: float = 0.0
    """Share of which a part of the graph is known."""

    def __post_init__(self):
        for field, known in (
            ("families", FAMILIES),
            ("mechanisms", MECHANISMS),
            ("noises", NOISES),
        ):
            unknown = [name for name in getattr(self, field) if name not in known]
            if unknown or not getattr(self, field):
                raise ValueError(
                    f"{field}: unknown or none: {', '.join(unknown) or '(empty)'}; "
                    f"choose from {', '.join(known)}"
                )
        if not 2 <= self.min_size <= self.max_size <= self.max_vars:
            raise ValueError(
                f"sizes {self.min_size} to {self.max_size} do not fit 2 <= min_size "
                f"<= max_size <= max_vars = {self.max_vars}"
            )
        for name, share in zip(Special._fields, self.shares, strict=True):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} = {share} must be a share, from 0 to 1")
        for name in ("density", "noise", "lengthscale", "range"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"min_{name} = {low} is above max_{name} = {high}")
            if low <= 0 and name != "density":
                raise ValueError(f"min_{name} = {low} must be positive")

    @property
    def shares(self) -> tuple[float, ...]:
        """Of models that are `Special`, in its order."""
        return tuple(getattr(self, name) for name in Special._fields)


class Special(NamedTuple):
    """What is special about a model, as `SCMPrior` says of its shares."""

    hidden: Bool[Array, ""]
    quiet: Bool[Array, ""]
    inert: Bool[Array, ""]
    mixed: Bool[Array, ""]
    tight: Bool[Array, ""]
    feedback: Bool[Array, ""]
    told: Bool[Array, ""]


def inherit(prior: SCMPrior, header: dict) -> SCMPrior:
    """The prior of a stage that builds on an artifact with this `header`: its own sizes and shares
    of special models, and all else from the prior that the artifact was made with, unless a setting
    of its own departs from the default. So a prior that stage 1 was given reaches all later stages.
    """
    names = ("max_vars", "min_size", "max_size", *Special._fields)
    own = {name: getattr(prior, name) for name in names}
    if prior != SCMPrior(**own):
        return prior
    return SCMPrior(**prior_in(header) | own)


def prior_in(header: dict) -> dict[str, Any]:
    """The settings of the prior that the artifact with this `header` was made with."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in header["config"]["prior"].items()
    }


# The world that the surrogate is trained in: shares by judgement; of `hidden`, `inert`, `mixed`,
# `tight` and `told` lowered once, as a first training cost regret in the narrow world.
WORLD: dict[str, Any] = dict(
    hidden=0.2, quiet=0.25, inert=0.07, mixed=0.25, tight=0.08, feedback=0.05, told=0.2
)


def multimodal(prior: SCMPrior) -> SCMPrior:
    """The same with wide ranges and responses that have several valleys (if its mechanisms have
    any): problems where it pays to look around.
    """
    return replace(
        prior,
        mechanisms=("fourier",) if "fourier" in prior.mechanisms else prior.mechanisms,
        min_lengthscale=0.4,
        max_lengthscale=1.0,
        min_range=3.0,
        max_range=4.0,
    )


def sample_scm(
    key: Key[Array, ""], prior: SCMPrior, feedback: Bool[Array, ""] | None = None
) -> SyntheticSCM:
    """A random model whose target has an ancestor that can lower it by at least `min_effect`
    standard deviations, or none if it is to be inert (redrawn until it is so; then variables are
    hidden, that ancestor perhaps among them). `feedback` says whether there is some, if that is not
    to be drawn here.
    """
    share_key, hidden_key, told_key = jr.split(jr.fold_in(key, KINDS), 3)
    special = Special(*(jr.uniform(share_key, (len(prior.shares),)) < jnp.array(prior.shares)))
    if feedback is not None:
        special = special._replace(feedback=feedback)

    def attempt(state):
        key, draw_key = jr.split(state[0])
        return key, *_sample_once(draw_key, prior, special)

    shape = jax.eval_shape(lambda k: _sample_once(k, prior, special), key)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
    scm = jax.lax.while_loop(lambda state: ~state[2], attempt, (key, *nothing))[1]
    scm = hide(hidden_key, scm, special.hidden) if prior.hidden else scm
    return tell(told_key, scm, special.told) if prior.told else scm


def hide(key: Key[Array, ""], scm: SyntheticSCM, some: Bool[Array, ""]) -> SyntheticSCM:
    """The model with one or two of its variables hidden, if `some` are to be: any but the target,
    of three variables at most one; causes of the target with other children four times as often.
    """
    num_vars = scm.var_mask.shape[0]
    u = draw(jr.uniform, key, number=(), which=(num_vars,))
    reach = (scm.graph | jnp.eye(num_vars, dtype=bool)).astype(float)
    for _ in range(int(np.ceil(np.log2(num_vars)))):  # paths of every length
        reach = jnp.minimum(reach @ reach, 1.0)
    confounds = (jnp.take(reach, scm.target, axis=1) > 0) & (scm.graph.sum(1) >= 2)
    # the largest of log weights plus Gumbel noise: draws without replacement
    score = jnp.where(confounds, jnp.log(4.0), 0.0) - jnp.log(-jnp.log(u["which"] + 1e-7))
    score = jnp.where(scm.task.possible_parents, score, -jnp.inf)
    number = jnp.minimum(whole(u["number"], 1, MAX_HIDDEN + 1), scm.var_mask.sum() - 2)
    rank = (score[:, None] < score[None]).sum(1)
    hidden = some & scm.task.possible_parents & (rank < number)
    low, high = (jnp.where(hidden, 0.0, end) for end in (scm.low, scm.high))
    return replace(scm, hidden=hidden, var_mask=scm.var_mask & ~hidden, low=low, high=high)


def tell(key: Key[Array, ""], scm: SyntheticSCM, some: Bool[Array, ""]) -> SyntheticSCM:
    """The model with a part of its graph known, if `some` is to be: of some pairs (of all
    variables, or with the target as the effect) whether there is an edge; or tiers, which tell that
    there is none from a later to an earlier one. All of it is true.
    """
    num_vars, exists, graph = scm.var_mask.shape[0], scm.var_mask, scm.seen_graph
    u = draw(
        jr.uniform, key, pair=(num_vars, num_vars), **dict.fromkeys(("kind", "share", "tiers"), ())
    )
    kind, to_target = whole(u["kind"], 0, 3), jnp.arange(num_vars) == scm.target
    pairs = ((kind == 0) | to_target[None]) & (u["pair"] < u["share"] ** 2)
    place = (jnp.cumsum(exists[scm.order]) - 1)[scm.position]
    tier = place * whole(u["tiers"], 2, 5) // exists.sum()
    told = jnp.where(kind == 2, (tier[:, None] > tier[None]) & ~graph, pairs)
    told &= some & exists[:, None] & exists[None] & ~jnp.eye(num_vars, dtype=bool)
    return replace(scm, known=jnp.where(told, jnp.where(graph, 1, -1), 0))


def _sample_once(
    key: Key[Array, ""], prior: SCMPrior, special: Special
) -> tuple[SyntheticSCM, Bool[Array, ""]]:
    """One draw, and whether some variable of it qualifies as a target."""
    d = prior.max_vars
    graph_key, uniform_key, normal_key, noise_key = jr.split(key, 4)
    u = draw(
        jr.uniform,
        uniform_key,
        **dict.fromkeys(("size", "family", "mechanism", "target"), ()),
        **dict.fromkeys(("order", "length", "noise"), (d,)),
        range=(2, d),
        weight=(d, d),
        sign=(d, d),
        phase=(d, NUM_HIDDEN),
    )
    n = draw(jr.normal, normal_key, frequency=(d, d, NUM_HIDDEN), amplitude=(d, NUM_HIDDEN))
    size = whole(u["size"], prior.min_size, prior.max_size + 1)
    v = draw(
        jr.uniform,
        jr.fold_in(key, KINDS),
        **dict.fromkeys(("family", "loud", "even", "copy", "original", "back"), ()),
        **dict.fromkeys(("mechanism", "noise", "tight", "quiet"), (d,)),
    )
    index = jnp.arange(d)
    family = one_of(u["family"], prior.families, FAMILIES)
    family = jnp.where(special.mixed, whole(v["family"], 0, len(FAMILIES)), family)
    density = prior.min_density, prior.max_density
    graph = sample_graph(graph_key, family, size, d, density)
    graph, copy, back = _special_edges(graph, v, size, special)
    mechanism, noise_kind = _kinds(jr.uniform(noise_key), u, v, prior, special)
    mechanism = jnp.where(copy, index_of("linear", MECHANISMS), mechanism)
    determined = copy | (special.tight & (v["tight"] < TIGHT_SHARE))
    weigh = jnp.where(back, FEEDBACK_WEIGHT, 1.0)
    phases, fixed = (
        jnp.array([getattr(kind, name) for kind in MECHANISMS.values()])[mechanism]
        for name in ("phases", "lengthscale")
    )
    length = log_between(u["length"], prior.min_lengthscale, prior.max_lengthscale)
    length = jnp.where(special.quiet, QUIET_LENGTH, 1.0) * length
    lengthscale = jnp.where(jnp.isnan(fixed), length, fixed)
    low, high = between(u["range"], prior.min_range, prior.max_range)
    scm = SyntheticSCM(  # pyright: ignore[reportCallIssue]  # `parents` and `names` are properties
        family=family,
        # a random name for each place, padding kept last
        order=jnp.argsort(jnp.where(index < size, u["order"], 2.0 + index)),
        adjacency=graph | back,
        mechanism=mechanism,
        noise_kind=noise_kind,
        weights=weigh * between(u["weight"], 0.5, 2.0) * jnp.where(u["sign"] < 0.5, -1.0, 1.0),
        frequencies=weigh[:, :, None] * n["frequency"] / lengthscale[None, :, None],
        phases=between(u["phase"], *jnp.moveaxis(phases, -1, 0)[:, :, None]),
        amplitudes=2.0 * jnp.sqrt(2.0 / NUM_HIDDEN) * n["amplitude"],
        noise_scale=log_between(u["noise"], prior.min_noise, prior.max_noise)
        * jnp.where(determined, TIGHT_NOISE, 1.0),
        shift=jnp.zeros(d),
        spread=jnp.ones(d),
        target=jnp.array(0),
        low=jnp.where(index < size, -low, 0.0),
        high=jnp.where(index < size, high, 0.0),
        var_mask=index < size,
        hidden=jnp.zeros(d, bool),
    )
    scm, unit = _in_units(scm, prior.standardised)
    # all variables are as quiet or, every other time, each is by chance
    loud = log_between(v["loud"], *QUIET_NOISE) ** jnp.where(v["even"] < 0.5, 1.0, v["quiet"])
    loud = jnp.where(special.quiet, loud, 1.0)
    scm = replace(scm, noise_scale=loud * scm.noise_scale)
    # what moves a quiet target by much less is still seen
    unseen = jnp.where(special.inert, loud[scm.position], 1.0)
    qualifies, settled = _qualifies(scm, prior.min_effect * unseen * unit, unit.max(), special)
    return replace(scm, target=pick(u["target"], qualifies)), qualifies.any() & settled


def _kinds(
    u_noise: Float[Array, ""],
    u: dict[str, Float[Array, "..."]],
    v: dict[str, Float[Array, "..."]],
    prior: SCMPrior,
    special: Special,
) -> tuple[Int[Array, "*vars"], Int[Array, "*vars"]]:
    """Kinds of mechanism and of noise, as the prior has them (`u`) or, in special models, of each
    variable on its own (`v`).
    """
    mechanism = one_of(u["mechanism"], prior.mechanisms, MECHANISMS)
    any_kind = special.mixed | special.quiet  # far outside what was seen the kind is what counts
    mechanism = jnp.where(any_kind, whole(v["mechanism"], 0, len(MECHANISMS)), mechanism)
    noise_kind = one_of(u_noise, prior.noises, NOISES)
    return mechanism, jnp.where(special.mixed, whole(v["noise"], 0, len(NOISES)), noise_kind)


def _in_units(scm: SyntheticSCM, standardised: bool) -> tuple[SyntheticSCM, Float[Array, " vars"]]:
    """The model with `standardised` variables or, if they are not to be, with ranges, given in
    deviations, in the variables' own units; and the unit of each.
    """
    mean, deviation = _moments(scm, standardised)
    if standardised:
        return replace(scm, shift=mean, spread=deviation), jnp.ones(len(mean))
    centre, unit = mean[scm.position], deviation[scm.position]
    low, high = (jnp.where(scm.var_mask, centre + unit * end, 0.0) for end in (scm.low, scm.high))
    return replace(scm, low=low, high=high), unit


def _special_edges(
    graph: Bool[Array, "vars vars"],
    u: dict[str, Float[Array, "..."]],
    size: Int[Array, ""],
    special: Special,
) -> tuple[Bool[Array, "vars vars"], Bool[Array, " vars"], Bool[Array, "vars vars"]]:
    """The graph, in which a copy, if there is one, is a leaf whose only parent is its original;
    that copy; and the edge of feedback, if there is one: one of the graph's turned around.
    """
    index = jnp.arange(len(graph))
    number = whole(u["copy"], 1, size)
    copy, original = special.tight & (index == number), index == whole(u["original"], 0, number)
    graph = jnp.where(copy[None], original[:, None], graph & ~copy[:, None])
    cause, effect = jnp.divmod(pick(u["back"], graph.reshape(-1)), len(graph))
    return graph, copy, special.feedback & (index == effect)[:, None] & (index == cause)[None]


def _qualifies(
    scm: SyntheticSCM, least: Float[Array, " vars"], unit: Float[Array, ""], special: Special
) -> tuple[Bool[Array, " vars"], Bool[Array, ""]]:
    """Which variables may be the target: those that something lowers by at least the `least`
    effect, or nothing in an inert model; and whether feedback, if there is some, settles.
    """
    drops, largest = _largest_drops(scm)
    # without a least effect there is nothing that an inert model would lack
    inert = special.inert & (least.max() > 0)
    qualifies = scm.var_mask & jnp.where(inert, drops < least, drops >= least)
    nothing = Intervention.none(len(scm.var_mask))
    _, change = scm.settle(scm.reference_noise()[::4], nothing)
    return qualifies, ~special.feedback | ((change <= SETTLED) & (largest < MAX_EFFECT * unit))


def _moments(
    scm: SyntheticSCM, standardised: bool
) -> tuple[Float[Array, " vars"], Float[Array, " vars"]]:
    """Observational mean and deviation of every variable in the order of generation, each from
    parents already `standardised` or as they are.
    """
    disturbance = scm.disturbance(antithetic_normal(7, NUM_CALIBRATION, scm.order.shape[0]))

    def generate(x, k):
        raw = scm.structural_equation(x, disturbance, k)
        mean, deviation = raw.mean(), raw.std()
        return x.at[:, k].set((raw - mean) / deviation if standardised else raw), (mean, deviation)

    _, moments = jax.lax.scan(
        generate, jnp.zeros_like(disturbance), jnp.arange(disturbance.shape[1])
    )
    return moments


def _largest_drops(scm: SyntheticSCM) -> tuple[Float[Array, " vars"], Float[Array, ""]]:
    """For every variable j as a target: the largest E[X_j] - E[X_j | do(X_i = v)] over other
    variables i and a coarse grid of values; and the largest of either sign.
    """
    num_vars = scm.order.shape[0]
    noise = scm.reference_noise()[::4]
    shifted = scm.mean_table(value_grid(scm.low, scm.high, 5), noise)
    baseline = scm.simulate(noise, Intervention.none(num_vars)).mean(0)
    others = scm.var_mask[:, None] & ~jnp.eye(num_vars, dtype=bool)
    moved = jnp.where(others[:, None], baseline[None, None] - shifted, 0.0)
    return moved.max((0, 1)), jnp.abs(moved).max()
