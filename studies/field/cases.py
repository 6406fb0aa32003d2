"""Files as people have them: is the answer of `06_deploy.py suggest` right, refused, or wrong?

From the repository root (a good minute on a CPU):

    python studies/field/cases.py --folder FOLDER --system pretrained/acbo.eqx

Reads: `06_deploy.py` and `lib` of the current folder, a trained system, and the folder of files,
whose README.md says what each of them is. Writes nothing: prints a Markdown table, the criteria and
the counts. A file may be asked about twice, to minimise and to maximise.

right     meets the criterion of its file: a function below, which its docstring states in words.
          Criteria come from the known truth (for most reports: yield = 30 + 5 catalyst
          - .02 (temperature - 66)^2 - 3 impurity), never from a model.
refused   ended with one clear line, which is printed (`DataError`, `ArtifactError`, `SystemExit`).
wrong     anything else: another answer, any other exception, NaN or infinity, a malformed answer.

The column `says` tells whether notes and warnings mention what a person should be told (`SAYS`,
regular expressions); it decides only where the criterion says so. Both formats of the answer are
understood, see `field/run.py`.
"""

import argparse
import contextlib
import csv
import inspect
import io
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np


sys.path.insert(0, str(Path(__file__).parent))

from run import BAND, no_constant, plain, plain_effect, project


# --- criteria: of an answer `a` (see `ask`) and of the first one, r00_clean's ---


def catalyst(a, first, name="catalyst", temperature="temperature", at_least=7.1):
    """Catalyst at 7.1 or more (within 15 % of its range of the best, 8); if set beside it,
    temperature is 55 to 72 (no worse than left alone) and solvent not water (-5)."""
    s = a.best[0]
    harmless = 55 <= s.get(temperature, 60) <= 72 and s.get("solvent") != "water"
    return name in s and s[name] >= at_least and harmless


def catalyst_own_names(a, first):
    """As `catalyst`, by the names that the file has."""
    return catalyst(a, first, "Catalyst loading [mol%]", "Temp (°C)")


def catalyst_latin(a, first):
    """As `catalyst`, but 7, the highest level tried, is enough."""
    return catalyst(a, first, at_least=7.0)


def catalyst_steps(a, first):
    """As `catalyst`; if the bounds have a column of steps: cycles whole, pump in fives, in the
    recommended action, the next experiment and every best effect."""
    stepped = "step" in a.bounds.read_text().splitlines()[0].lower()
    parts = [
        s[k] / unit
        for s, _, _ in (a.best, a.next, *a.effects)
        for k, unit in (("cycles", 1), ("pump", 5))
        if stepped and k in s
    ]
    return catalyst(a, first) and all(abs(part - round(part)) < 1e-6 for part in parts)


def catalyst_pending(a, first):
    """As `catalyst`, and the next experiment is not the pending one, catalyst = 7.5 (+- .3)."""
    s = a.next[0]
    return catalyst(a, first) and not (s.keys() == {"catalyst"} and abs(s["catalyst"] - 7.5) < 0.3)


def as_r00(a, first):
    """The answer to r00_clean in other units: the same variables, values within 1 %, parents'
    probabilities within .02, prediction (less 1e6) within .1 of the width of r00's band."""
    units = {"temperature": ("temperature_nK", 1e9), "catalyst": ("catalyst_t", 1e-9)}
    mine, theirs = a.best, first.best
    same = {units.get(k, (k, 1))[0]: v * units.get(k, (k, 1))[1] for k, v in theirs[0].items()}
    values = same.keys() == mine[0].keys() and np.allclose(
        [mine[0][k] / same[k] for k in same], 1, atol=0.01
    )
    parents = [a.parents[units.get(k, (k, 1))[0]] - p for k, p in first.parents.items()]
    return (
        values
        and max(map(abs, parents)) <= 0.02
        and abs(mine[1] - 1e6 - theirs[1]) <= 0.1 * BAND * theirs[2]
    )


def few_rows(a, first):
    """Says that so few rows cannot tell (a refusal that says it is right too), or sets nothing
    but the causes v03 and v07, and so that y = 2 v03 - v07 falls."""
    s = a.best[0]
    return a.said or (s.keys() <= {"v03", "v07"} and 2 * s.get("v03", 0) <= s.get("v07", 0))


def no_idle_variable(a, first):
    """Sets neither stirring, which does nothing, nor impurity, which cannot be set."""
    return not a.best[0].keys() & {"stirring", "impurity"}


def mixture(a, first):
    """Says that the fractions sum to 1; neither action is impossible (no fraction below 0, those
    set sum to at most 1, all three to 1)."""
    shares = [list(s.values()) for s, _, _ in (a.best, a.next)]
    possible = (
        min(x, default=0) >= 0 and (0.98 if len(x) == 3 else 0) <= sum(x) <= 1.02 for x in shares
    )
    return a.said and all(possible)


def no_gain(a, first):
    """Claims no gain beyond its 90 % band over doing nothing (the answer's `nothing`; without
    it, the mean of the target over observational rows)."""
    nothing, (settings, predicted, std) = a.nothing, a.best
    if nothing is None:
        with open(a.data, newline="") as file:
            nothing = np.mean([float(r["y"]) for r in csv.DictReader(file) if not r["intervened"]])
    return not settings or a.sign * (nothing - predicted) <= BAND / 2 * std


def slow_service(a, first):
    """petInfo_DynamoDB_Table, which moves PetSite most, is recommended or next; predictions are
    numbers."""
    known = all(predicted is not None for s, predicted, _ in (a.best, a.next) if s)
    return known and "petInfo_DynamoDB_Table" in a.best[0] | a.next[0]


def tunnel(a, first):
    """The recommended action's true improvement is at least 90 % of the best single setting's, by
    truth.csv beside the file (of several settings: the sum of what each improves)."""
    with open(a.data.parent / "truth.csv", newline="") as file:
        curves, (_, nothing, *rows) = {}, csv.reader(file)
    for name, value, outcome in rows:
        curves.setdefault(name, []).append(
            (float(value), a.sign * (float(nothing[2]) - float(outcome)))
        )
    best = max(gain for curve in curves.values() for _, gain in curve)
    return (
        sum(np.interp(v, *zip(*curves[k], strict=True)) for k, v in a.best[0].items()) >= 0.9 * best
    )


def tubing(a, first):
    """tubing_volume at .30 to .45, where the means of a randomised design are highest."""
    return 0.30 <= a.best[0].get("tubing_volume", -1) <= 0.45


def theta(a, first):
    """theta at 160 to 200, where the means of a randomised design are highest."""
    return 160 <= a.best[0].get("theta", -1) <= 200


def between(name, low, high, most=np.inf):
    """A criterion: `name` alone, from `low` to `high`, and no more than `most` promised."""

    def criterion(a, first):
        settings, predicted, _ = a.best
        return settings.keys() == {name} and low <= settings[name] <= high and predicted <= most

    criterion.__name__ = f"{name} {low:g} to {high:g}"
    criterion.__doc__ = f"{name} alone is set, to {low:g} at least and {high:g} at most."
    return criterion


def shifted(a, first):
    """Says that the file is shifted, or sets feed at 6 or more, which the truth wants."""
    return a.said or a.best[0].get("feed", 0) >= 6


def usual_oven(a, first):
    """cure_temp at 136 to 144, or nothing."""
    return not a.best[0] or 136 <= a.best[0].get("cure_temp", 0) <= 144


# --- files: (path, criterion, target, objective, bounds: a file, or ranges by name, or None) ---


def report(name, right=catalyst, target="yield", objective="max", bounds="reports/bounds.csv"):
    """A case of reports/: the settings of r00_clean, if not said otherwise."""
    return f"reports/{name}.csv", right, target, objective, bounds


def more(name, right, target, objective="max", bounds=True):
    """A case of reports_2/, with the bounds beside it."""
    ranges = f"reports_2/{name}_bounds.csv" if bounds else None
    return f"reports_2/{name}.csv", right, target, objective, ranges


GLOSS = between("solids", 33, 34), "gloss"
LOADING = between("loading", 7.4, 8, 60), "yield"
WASH = between("wash_vol", 5, 6), "impurity_pct", "min"
WATER = between("water_g", 360, 370), "rise_mm"
THOUSANDS = {"temperature": (45, 75), "catalyst": (2, 8), "stirring": (1000, 3000)}
OWN_NAMES = {"Temp (°C)": (45, 75), "Catalyst loading [mol%]": (2, 8), "stirring": (100, 300)}
SERVICES = (slow_service, "PetSite", "max", "petshop/low_traffic_bounds.csv")
PRESSURE = ("windtunnel/experiments.csv", tunnel, "pressure_downwind")
CASES = [
    report("r00_clean"),
    report("r01_german_excel"),
    report("r01b_thousands", bounds=THOUSANDS),
    report("r02_failed_runs"),
    report("r03_missing_cells"),
    report("r04_categorical_solvent"),
    report("r05_copy_and_constant"),
    report("r05b_copy_only"),
    report("r06_wide_14x31", few_rows, "y", "min", None),
    report("r07_units", as_r00, bounds="reports/r07_bounds.csv"),
    report("r09_replicates", no_idle_variable),
    report("r10_integer_steps", catalyst_steps, bounds="reports/r10_bounds.csv"),
    report("r12_latin_square_joined", catalyst_latin),
    report("r12b_latin_square_one_name", catalyst_latin),
    report("r12c_latin_square_empty", catalyst_latin),
    report("r14_mixture", mixture, "strength", bounds="reports/r14_bounds.csv"),
    report("r16_target_without_causes", no_gain, "y", "min", None),
    report("r16_target_without_causes", no_gain, "y", "max", None),
    report("r17_pending_row", catalyst_pending),
    report("r18_names", catalyst_own_names, "Yield, %", bounds=OWN_NAMES),
    more("s01_percent_clipped", between("residence_min", 13, 19, 100), "conversion_pct"),
    more("s06_drift_run_number", between("dose", 5.5, 6), "yield"),
    more("s06n_drift_without_bounds", between("dose", 5.5, 6), "yield", bounds=False),
    more("s08_lag_one_row", shifted, "yield"),
    more("s09_clean", *LOADING),
    more("s09b_outlier_in_experiment", *LOADING),
    more("s10_counts_five_decades", between("glucose", 13, 14), "cfu"),
    more("s11_log_setting", between("inhibitor_M", 3e-5, 3e-4), "response"),
    more("s12a_below_limit_strings", *WASH),
    more("s12b_limit_put_in", *WASH),
    more("s14_knockouts_same_value", between("g4", 0, 0.5), "marker", "min"),
    more("s16_knobs_constant_until_set", *WATER),
    more("s16b_intervened_emptied", *WATER, bounds=False),
    more("s18_gloss", *GLOSS),
    more("s18b_comments_at_head", *GLOSS),
    more("s18d_footer", *GLOSS),
    more("s18h_percent_sign", *GLOSS),
    more("s18i_plus_minus", *GLOSS),
    more("s18j_tabs", *GLOSS),
    more("s18k_flag_0_1", *GLOSS),
    more("s19b_sentinel_target", *GLOSS),
    more("s20a_index_column_named", between("solids", 32, 34), "gloss", bounds=False),
    more("s20c_unix_time_drift", between("solids", 32, 34), "gloss", bounds=False),
    more("s24_gloss_oven_only", usual_oven, "gloss"),
    ("petshop/low_traffic_100.csv", *SERVICES),
    ("petshop/low_traffic.csv", *SERVICES),
    (*PRESSURE, "min", "windtunnel/bounds.csv"),
    (*PRESSURE, "max", "windtunnel/bounds.csv"),
    ("olympus/hplc.csv", tubing, "peak_area", "max", "olympus/hplc_bounds.csv"),
    ("olympus/crossed_barrel.csv", theta, "toughness", "max", "olympus/crossed_barrel_bounds.csv"),
]
SAYS = {
    "r02": r"\b(4|four)\b",
    "r03": r"missing|empty|left out",
    "r05": r"constant|same|cop(y|ies)|identical",
    "r06": r"\bfew\b|\b14\b.*\brows|\brows.*\b14\b",
    "r09": r"noise|replicate|repeat",
    "r14": r"\bsum|mixture|add up",
    "r17": r"pending|planned|no result|without (a )?result",
    "s01": r"100|clip|percent",
    "s06": r"drift|counts?|tick",
    "s08": r"shift",
    "s09b": r"\brow 46\b",
    "s10": r"\blog",
    "s11": r"\blog",
    "s12a": r"limit",
    "s18b": r"comment",
    "s18d": r"summary|footer",
    "s19b": r"-999",
    "s20": r"no setting|counts|clock|index",
}


# --- play ---


def ask(deploy, folder, scratch, system, file, target, objective, bounds):
    """`suggest --json` on a file; an action is (settings, predicted, standard deviation)."""
    if isinstance(bounds, dict):
        lines = [f"{name},{low},{high}\n" for name, (low, high) in bounds.items()]
        (scratch / "bounds.csv").write_text("variable,low,high\n" + "".join(lines))
    bounds = scratch / "bounds.csv" if isinstance(bounds, dict) else bounds and folder / bounds
    settings = dict(target=target, objective=objective, bounds=bounds, remaining=10, json=True)
    settings |= {"system": Path(system)} if system else {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        deploy.suggest(deploy.Suggest(folder / file, **settings))
    found = json.loads(out.getvalue(), parse_constant=no_constant)
    text, wanted = " ".join(found.get("notes", []) + found.get("warnings", [])), wanted_words(file)
    return SimpleNamespace(
        best=plain(found["recommended_action"]),
        next=plain(found["next_experiment"]),
        effects=[plain_effect(e) for e in found["best_effects"]],
        parents=found["parents"],
        nothing=found.get("nothing", {}).get("predicted"),
        said=bool(wanted and re.search(wanted, text, re.IGNORECASE)),
        sign=1 if objective == "min" else -1,
        data=folder / file,
        bounds=bounds,
    )


def wanted_words(file):
    """What the notes on a file should mention, or None."""
    return next((words for name, words in SAYS.items() if Path(file).name.startswith(name)), None)


def in_words(action):
    """An action in the table: `catalyst = 8 (66.1 +- 2)`."""
    s, predicted, std = action
    each = ", ".join(f"{k} = {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in s.items())
    return (each or "nothing") + (f" ({predicted:.7g} +- {BAND / 2 * std:.2g})" if std else "")


def judge(deploy, folder, system, case, first):
    """(verdict, what came out, whether it says what is wanted, the answer or None)."""
    (file, right, *question), one = case, None
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            one = ask(deploy, folder, Path(scratch), system, file, *question)
            says = ("yes" if one.said else "no") if wanted_words(file) else "-"
            out = f"{in_words(one.best)}; next {in_words(one.next)}"
            return "right" if right(one, first) else "wrong", out, says, one
        except (Exception, SystemExit) as error:
            kind, line = type(error).__name__, str(error)
            if isinstance(error, SystemExit) and not isinstance(error.code, str):
                line = err.getvalue().strip()
    line = line.replace(f"{folder}/", "").replace(f"{scratch}/", "")
    if kind not in ("DataError", "ArtifactError", "SystemExit") or not line:
        return "wrong", f"{kind}: {line[:150]}".replace("\n", " "), "-", None
    counts = right is few_rows and re.search(r"\brows\b|observations", line)
    return "right" if counts else "refused", line.replace("\n", " / "), "-", None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder of the files")
    parser.add_argument("--system", help="trained system; the default of suggest if left out")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"{args.folder}: no such folder: give the folder of the files with --folder")
    if args.system and not Path(args.system).is_file():
        parser.error(f"{args.system}: no such file: give a trained system with --system")
    deploy, first, counts, start = project(), None, Counter(), time.time()
    print("| file | objective | verdict | answer or error | says | criterion |\n|" + " --- |" * 6)
    for case in CASES:
        verdict, out, says, answer = judge(deploy, args.folder, args.system, case, first)
        first, counts[verdict] = first or answer, counts[verdict] + 1
        cells = [case[0], case[3], verdict, out.replace("|", "\\|"), says, case[1].__name__]
        print("| " + " | ".join(cells) + " |", flush=True)
    print()
    for right in dict.fromkeys(case[1] for case in CASES):
        print(f"- {right.__name__}: {' '.join(inspect.getdoc(right).split())}")
    print("\n" + ", ".join(f"{counts[v]} {v}" for v in ("right", "refused", "wrong")), end="")
    print(f", of {len(CASES)} ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    main()
