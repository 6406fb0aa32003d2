"""Plays `06_deploy.py suggest` on systems from outside the simulator: what a user suffers.

From the repository root (seconds per seed and system on a CPU, once everything is compiled):

    python studies/field/run.py --seeds 6 --system pretrained/acbo.eqx
    python studies/field/run.py --seeds 3 --asks 20 --systems chain plant_quiet_0.2

Reads: `06_deploy.py` and `lib` of the current folder, a trained system, and `systems.py` beside
this file, whose equations are the truth. Writes nothing: prints a line per system and the mean over
systems.

Figures of the first answer, each a mean over seeds (`-`: not defined for this system):

regret    0 for the best single setting, 1 for doing nothing, above 1 for harm; `-` where nothing
          can be gained.
worse     share of recommendations that are worse than doing nothing by more than 5 % of the
          target's deviation over the observational rows.
wild      share of recommended actions whose true effect is more than 3 standard deviations from
          the predicted one; a recommendation without a band counts as wild.
cover     share of the best effects whose truth lies in their 90 % band.
claims    only where nothing can be gained: share of answers that claim a gain beyond their band.
score     90 % interval score of the best effects, in deviations of the target over the rows in
          which it was not set: the width, and 20 times what the truth lies outside, so that wide
          bands do not help. Lower is better; the last line has its median over systems.
refused   share of seeds that ended with an error, which is printed.

With `--asks`, its own next experiments are run and fed back that many times:

regret@t  regret of the recommendation after t experiments (5, 10 and 20).
repeats   the most often that one and the same experiment was asked for.
used      how many it asked for, before its `stop` said that nothing more is worth it.
weight    the surrogate's weight in the check at the end (`-`: an answer without a check).

Understands both formats of the answer: {variable, value, predicted, std}, and
{settings, predicted, low, high} with a 90 % band.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np


HERE = Path(__file__).parent
sys.path[:0] = [str(Path.cwd()), str(HERE)]

BAND = 3.29  # width of a 90 % band in standard deviations


def module_of(name, path):
    """The Python file at `path`, imported under `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def project():
    """`06_deploy.py` of the current folder; it loads a trained system once, not at every call."""
    module = module_of("deploy", Path.cwd() / "06_deploy.py")
    from lib.system import TrainedACBOSystem

    load, kept = TrainedACBOSystem.load, {}

    def load_once(path, *args, **kwargs):
        if str(path) not in kept:
            kept[str(path)] = load(path, *args, **kwargs)
        return kept[str(path)]

    TrainedACBOSystem.load = staticmethod(load_once)
    return module


def write(path, system, rows, which):
    """Rows `[n, vars]` and the variables set in each, as the CSV that a person would bring."""
    lines = [",".join([*system.names, "intervened"])]
    for row, done in zip(rows, which, strict=True):
        cells = [f"{v:.17g}" for v in row]
        lines.append(",".join([*cells, ";".join(system.names[i] for i in done)]))
    path.write_text("\n".join(lines) + "\n")


def no_constant(name):
    """NaN and Infinity are not JSON."""
    raise ValueError(f"JSON holds {name}")


def plain(one):
    """(settings, predicted, standard deviation) of an action in either format."""
    if one is None:
        return {}, None, None
    single = {one["variable"]: one["value"]} if one.get("variable") else {}
    std = one.get("std")
    if std is None and one.get("high") is not None:
        std = (one["high"] - one["low"]) / BAND
    return one.get("settings", single), one.get("predicted"), std


def plain_effect(one):
    """`plain` for an entry of `best_effects`."""
    settings = one.get("settings") or {one["variable"]: one["value"]}
    std = one.get("std") or (one["high"] - one["low"]) / BAND
    return settings, one.get("mean", one.get("predicted")), std


def ask(deploy, folder, system, rows, which, bounds, weights, remaining):
    """One call of `suggest`: (recommended, next, best effects, the surrogate's weight, whether one
    more experiment is worth it).
    """
    data, limits = folder / "data.csv", folder / "bounds.csv"
    write(data, system, rows, which)
    lines = [f"{k},{float(a)!r},{float(b)!r}\n" for k, (a, b) in bounds.items()]
    limits.write_text("variable,low,high\n" + "".join(lines))
    settings = dict(
        data=data,
        target=system.target,
        objective=system.objective,
        bounds=limits,
        remaining=remaining,
        json=True,
        **({"system": Path(weights)} if weights else {}),
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        deploy.suggest(deploy.Suggest(**settings))
    answer = json.loads(out.getvalue(), parse_constant=no_constant)
    effects = [plain_effect(e) for e in answer["best_effects"]]
    weight = (answer.get("check") or {}).get("surrogate_weight", np.nan)
    more = (answer.get("stop") or {}).get("worth_it", True)
    action, following = plain(answer["recommended_action"]), plain(answer["next_experiment"])
    return action, following, effects, weight, more


def play(deploy, system, seed, asks, weights):
    """The figures of one seed on one system, by name."""
    rows, first, bounds = system.data(seed)
    which = [(int(i),) if i >= 0 else () for i in first]
    sign = 1.0 if system.objective == "min" else -1.0
    y = system.names.index(system.target)
    spread = rows[first < 0][:, y].std() if (first < 0).any() else rows[:, y].std()
    wide = rows[first != y][:, y].std()
    nothing, (best, variable, _) = system.mean(), system.best(bounds)
    gain = sign * (nothing - best) if variable else 0.0

    def regret(setting):
        return sign * (system.mean(setting or None) - best) / gain if gain else np.nan

    def judged(setting, predicted, std, effects):
        truth = system.mean(setting or None)
        known = predicted is not None and bool(std)
        wild = bool(setting) and (not known or abs(truth - predicted) > 3 * std)
        missed = np.array([abs(system.mean(s) - m) - BAND / 2 * d for s, m, d in effects])
        widths = np.array([BAND * d for _, _, d in effects])
        claims = bool(setting) and (
            not known or sign * (nothing - predicted) > BAND / 2 * std + 0.02 * spread
        )
        return dict(
            regret=regret(setting),
            worse=sign * (truth - nothing) > 0.05 * spread,
            wild=wild,
            cover=np.mean(missed <= 0),
            claims=claims if gain == 0.0 else np.nan,
            score=np.mean((widths + 20 * np.maximum(missed, 0.0)) / wide),
        )

    rng, path, asked, found = np.random.default_rng(1000 + seed), [], Counter(), None
    with tempfile.TemporaryDirectory() as folder:
        for t in range(asks + 1):
            left = max(asks - t, 1)
            best_action, (experiment, _, _), effects, weight, more = ask(
                deploy, Path(folder), system, rows, which, bounds, weights, left
            )
            if found is None:
                found = judged(*best_action, effects)
            path.append(regret(best_action[0]))
            if not more:  # the campaign ends here
                path += [path[-1]] * (asks - t)
                break
            if t < asks and experiment:
                asked[tuple(sorted((k, f"{float(v):.4g}") for k, v in experiment.items()))] += 1
                rows = np.vstack([rows, system.sample(rng, 1, experiment)])
                which.append(tuple(system.names.index(name) for name in experiment))
    found |= {f"regret@{t}": path[t] for t in (5, 10, 20) if t <= asks}
    if asks:
        repeats, used = max(asked.values(), default=0), sum(asked.values())
        found |= {"repeats": repeats, "used": used, "weight": weight}
    return found


def middle(values, of=np.nanmean):
    """Mean (or median) of what is defined; NaN if nothing is."""
    values = np.array(values, float)
    return np.nan if np.isnan(values).all() else of(values)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", nargs="*", help="names in systems.py; all if left out")
    parser.add_argument("--seeds", type=int, default=10, help="first data sets per system")
    parser.add_argument("--asks", type=int, default=0, help="experiments run and fed back")
    parser.add_argument("--system", help="trained system; the default of suggest if left out")
    parser.add_argument("--module", default=str(HERE / "systems.py"), help="file with SYSTEMS")
    args = parser.parse_args()
    for path in filter(None, (args.system, args.module)):
        if not Path(path).is_file():
            parser.error(f"{path}: no such file")
    module = module_of("field_systems", args.module)
    unknown = sorted(set(args.systems or ()) - set(module.SYSTEMS))
    if unknown or args.systems == []:
        known = ", ".join(module.SYSTEMS)
        parser.error(f"--systems: {', '.join(unknown) or 'none named'}: choose from {known}")
    if args.seeds < 1 or args.asks < 0:
        parser.error("--seeds must be at least 1, --asks at least 0")
    deploy, everything = project(), []
    for name in args.systems or module.SYSTEMS:
        results, refused = [], 0
        for seed in range(args.seeds):
            try:
                results.append(play(deploy, module.SYSTEMS[name], seed, args.asks, args.system))
            except (SystemExit, Exception) as error:  # what a user would see
                refused += 1
                line = f"{type(error).__name__}: {str(error)[:150]}"
                print(f"{name:44s} seed {seed}: {line}", flush=True)
        if results:
            means = {key: middle([r[key] for r in results]) for key in results[0]}
            means["refused"] = refused / args.seeds
            everything.append(means)
            figures = (f"{k} {'-' if np.isnan(v) else f'{v:.2f}'}" for k, v in means.items())
            print(f"{name:44s} " + "  ".join(figures), flush=True)
    label, figures = f"MEAN over {len(everything)} systems", []
    for key in everything[0] if everything else ():
        of = np.nanmedian if key == "score" else np.nanmean
        figures.append(f"{key} {middle([e[key] for e in everything], of):.3f}")
    print(f"{label:44s} " + "  ".join(figures))


if __name__ == "__main__":
    main()
