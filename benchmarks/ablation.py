"""What each ingredient of the surrogate's training buys: `small` with one thing changed at a time,
all for the same number of steps.

    python benchmarks/ablation.py --steps 1000

Each variant is a call of 02_train_surrogate.py with the flags in `VARIANTS`; one that is trained
already, for as many steps, is not trained again. Then all are held against the first on the same
held-out problems, with 200, 100 (which is what the demonstrations start from) and 48 observational
rows and two interventions per variable, at 5, 8 and 10 variables together, and where a parent of
the target has a substitute that is nearly collinear with it. Differences are paired, with 95 %
intervals over problems; what training with another seed changes is a variant of its own. Reads
artifacts/small/demos.npz.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks import surrogate as benchmark
from lib.buffer import DataError
from lib.config import check_settings, errors_for_people, use_compilation_cache
from lib.metrics import paired_difference, parent_f1, render, summarise, write_results
from lib.system import load_surrogate


@dataclass(frozen=True)
class Config:
    """Settings of the ablation."""

    steps: int = 1000
    """Gradient steps of every variant."""
    demos: Path = Path("artifacts/small/demos.npz")
    """The expert's demonstrations."""
    variants: tuple[str, ...] = ()
    """Variants to compare with the default; all if none is named."""
    num_problems: int = 500
    """Held-out problems per number of variables."""
    folder: Path = Path("artifacts/ablation")
    """Where weights and tables go."""

    def __post_init__(self):
        check_settings(self)


VARIANTS = {
    "as it is": (),
    "another seed": ("--seed", "1"),
    "one component": ("--model.num-components", "1"),
    "two blocks": ("--model.model-n-layers", "2"),
    "parents alone": ("--weights.effects", "0"),
    "effects alone": ("--weights.parents", "0", "--weights.expert", "0"),
    "no expert": ("--weights.expert", "0"),
    "the expert to the end": ("--expert-until", "1e9"),
    "100 rows at most": ("--design.max-obs", "100"),
    "200 rows always": ("--design.min-obs", "200", "--design.max-obs", "200"),
    "sizes 8 to 10": ("--prior.min-size", "8", "--buckets.0.max-size", "8"),
    "Erdős–Rényi alone": ("--prior.families", "erdos_renyi"),
    "last weights": ("--average", "0"),
    "no warm-up": ("--warmup-steps", "1"),
}
DEMONSTRATED = 100  # observational rows of `small`'s demonstrations
COLLINEAR = 0.9  # correlation from which a parent and another candidate count as substitutes


def train(config: Config, name: str) -> Path:
    """Weights of a variant."""
    folder = config.folder / f"{config.steps} steps" / name
    if not (folder / "surrogate.eqx").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "demos.npz").unlink(missing_ok=True)
        (folder / "demos.npz").hardlink_to(config.demos)
        settings = (
            "--folder",
            folder,
            "--steps",
            config.steps,
            "--evaluate-every",
            config.steps,
            *VARIANTS[name],
        )
        subprocess.run(
            [sys.executable, "02_train_surrogate.py", "small", *map(str, settings)], check=True
        )
    return folder / "surrogate.eqx"


def qualities(
    model, header: dict, problems: list[benchmark.Problems]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Per problem, whatever the weights were trained for; and how collinear a parent and another
    candidate are.
    """
    found, weights = [], header["config"]["weights"]
    for batch in problems:
        scores = benchmark.host(
            benchmark.score_parents(model, batch) | benchmark.score_effects(model, batch)
        )
        usable = np.isfinite(scores["effects"])
        error = np.where(usable, scores["effects"] - scores["mean"], 0.0)
        parents = {
            "set NLL": -scores["log_prob"],
            "parent F1": parent_f1(
                scores[benchmark.ACBO] > 0.5, scores["parents"], scores["possible"]
            ).per_problem,
        }
        effects = {
            "effect RMSE": np.sqrt((error**2).sum((1, 2)) / usable.sum((1, 2))),
            "share of the improvement": benchmark.share_of_improvement(scores["mean"], scores),
        }
        trained = (parents if weights["parents"] else {}) | (effects if weights["effects"] else {})
        found.append(trained | {"collinear": scores["collinear"]})
    joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return joined, joined.pop("collinear")


def main(config: Config) -> None:
    """Train what is missing, measure all, print and write the table."""
    unknown = [name for name in config.variants if name not in VARIANTS]
    if unknown:
        raise DataError(
            f"variants: unknown {', '.join(unknown)}; choose from {', '.join(VARIANTS)}"
        )
    use_compilation_cache(Path("artifacts/cache"))
    wanted = dict.fromkeys(("as it is", *(config.variants or VARIANTS)))
    weights = {name: train(config, name) for name in tqdm(wanted, desc="training")}
    models = {name: load_surrogate(path) for name, path in weights.items()}
    settings = benchmark.Config(num_problems=config.num_problems)
    report = benchmark.Report(settings, models["as it is"][0])
    for num_obs in (settings.num_obs, DEMONSTRATED, settings.few_obs):
        problems = [report.problems(size, num_obs) for size in settings.sizes]
        first, _ = qualities(*models["as it is"], problems)
        for name, model in tqdm(models.items(), desc=f"{num_obs} rows"):
            values, collinear = qualities(*model, problems)
            rows = {
                f"{num_obs} rows": np.ones(len(collinear), bool),
                f"{num_obs} rows, collinear parents": collinear > COLLINEAR,
            }
            for task, kept in rows.items():
                for metric, value in values.items():
                    report.add(
                        "ablation", task, name, metric, summarise(value[kept]), int(kept.sum())
                    )
                    if name != "as it is":
                        change = paired_difference(value[kept], first[metric][kept])
                        report.add(
                            "ablation", task, name, f"{metric}, change", change, int(kept.sum())
                        )
    write_results(config.folder, report.records)
    print(render(report.records, "ablation"))


if __name__ == "__main__":
    with errors_for_people():
        main(tyro.cli(Config, description=__doc__))
