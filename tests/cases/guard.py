"""What two commits give on fixed inputs: a change that is to change nothing is held to it.

    .venv/bin/python tests/cases/guard.py --against main                this tree against a commit
    .venv/bin/python tests/cases/guard.py --against main answer stages  some of its parts only

Both run here, one after the other, the commit from a worktree of its own, because another
processor or another version of XLA rounds otherwise: numbers kept from elsewhere would be no test.
Status 1 beyond 1e-5. Compared are: posterior, effects and policy of the shipped weights on the ten
data sets of shipped.npz; losses, norms of the gradients and what two steps leave of toy runs of
stages 1 to 4; rewards of a group; an expert's run; a campaign of every method; an answer of
`suggest`. Numbers of training agree to 1e-4: other programs round otherwise, and a step divides by
such numbers. So do those of an answer, which are rounded: a last digit turns. Some eight minutes
for each of the two from an empty cache; no part of the checks that every commit has to pass.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path


os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is most of it
ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "artifacts" / "cache"))
sys.path.insert(0, str(ROOT))

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from lib.buffer import ExperienceBuffer
from lib.expert import run_parent_scale
from lib.expert_posterior import ParentScaleConfig
from lib.grpo import GRPOConfig, Simulator, collect_campaign, grpo_loss
from lib.imitation import ImitationConfig
from lib.methods import METHODS, play
from lib.problems import DataDesign, draw_problems, optima
from lib.rewards import RewardConfig
from lib.scm import Task
from lib.scm_prior import SCMPrior
from lib.surrogate import mean_losses
from lib.system import TrainedACBOSystem


STORED = Path(__file__).parent / "guard.npz"
TRAINING = ("stage", "gradient", "suggest")  # names that begin so: tolerance 1e-4
SHIPPED = TrainedACBOSystem.load(ROOT / "pretrained" / "acbo.eqx")


def norms(tree) -> np.ndarray:
    """The norm of every array in a tree."""
    learned = eqx.filter(tree, eqx.is_inexact_array)
    return np.array([float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(learned)])


def shipped() -> dict:
    """Posterior, effects and policy of the shipped system on ten stored data sets."""
    with np.load(ROOT / "tests" / "cases" / "shipped.npz") as file:
        inputs = {n[3:]: jnp.asarray(file[n]) for n in file.files if n.startswith("in/")}

    @eqx.filter_jit
    def read(one):
        buffer = ExperienceBuffer(one["values"], one["intervened"], one["valid"])
        state = SHIPPED.state(buffer, Task(one["target"], one["low"], one["high"], one["var_mask"]))
        return {
            "marginals": state.output.marginals(),
            "effect_mean": state.output.effect_mean,
            "effect_std": state.output.effect_std,
            "probs": state.posterior.probs,
            "policy": jnp.exp(SHIPPED.policy(state).logits),
        }

    return jax.lax.map(read, inputs)


def stages() -> dict:
    """Toy runs of stages 1 to 4: what they log, and the norms of the weights that they write."""
    toys = (  # script, folder, log, what its entries are called, settings
        (
            *("01_extract_demos", "toy", "demos", ""),
            dict(num_models=4, num_steps=3, min_trajectory_length=3),
        ),
        ("02_train_surrogate", "toy", "surrogate", "", dict(steps=2, warmup_steps=1)),
        ("03_warmstart_acquisition", "toy", "policy", "warm_", dict(iterations=2)),
        (
            *("03_warmstart_acquisition", "cold", "policy", "cold_"),
            dict(iterations=2, imitation=ImitationConfig(use_behavioral_cloning=False)),
        ),
        ("04_train_e2e", "toy", "acbo", "", dict(rounds=2, levels=2)),
    )
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        toy = Path(temporary) / "toy"
        for name, folder, log, prefix, change in toys:
            there = Path(temporary) / folder
            if folder == "cold":
                there.mkdir()
                shutil.copy(toy / "surrogate.eqx", there)
            script = importlib.import_module(name)
            script.main(replace(script.PRESETS["smoke"][1], folder=there, **change))
            for line in (there / "logs" / f"{log}.jsonl").read_text().splitlines():
                record = json.loads(line)
                start = f"stage {name[:2]}/{record['step']}/{prefix}"
                for key in record.keys() - {"step", "time"}:
                    found[start + key] = np.array(record[key])
        system = TrainedACBOSystem.load(toy / "acbo.eqx")
    # but for weights that add one number to all logits (those of steps done and left are among the
    # direct ones): their gradient is rounding, of which Adam makes whole steps
    policy = eqx.tree_at(
        lambda policy: (policy.score[1].bias, policy.direct.bias, policy.direct.weight),
        system.policy,
        (None,) * 3,
    )
    return found | {
        "stage 04/surrogate": norms(system.surrogate),
        "stage 04/policy": norms(policy),
    }


def gradients() -> dict:
    """Losses and gradients of the shipped surrogate and policy; rewards of a group."""
    prior = SCMPrior(max_vars=6, max_size=6)
    bins = SHIPPED.surrogate.config.num_bins
    design = DataDesign(60, 60, max_interventions=10, num_steps=2)
    problems = draw_problems(jr.key(2), 2, prior, design, bins)
    config, rewards = GRPOConfig(), RewardConfig()

    def loss(model):
        losses = mean_losses(model, [problems], None)
        return losses.parent_nll + losses.effect_nll, losses

    @eqx.filter_jit
    def policy(model):
        def one(key, problem):
            simulator = Simulator(SHIPPED.surrogate, problem.scm, problem.truth, rewards)
            return collect_campaign(key, simulator, model, problem.buffer, 2, config)[0]

        groups = jax.vmap(one)(jr.split(jr.key(3), 2), problems)
        groups = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), groups)
        both = eqx.filter_value_and_grad(grpo_loss, has_aux=True)
        return both(model, SHIPPED.policy, groups, replace(config, kl_weight=0.1)), groups

    surrogate = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
    (_, losses), gradient = surrogate(SHIPPED.surrogate)
    ((_, metrics), policy_gradient), groups = policy(SHIPPED.policy)
    return {
        "gradient/surrogate": norms(gradient),
        "gradient/policy": norms(policy_gradient),
        "gradient/losses": np.array([losses.parent_nll, losses.effect_nll]),
        "gradient/metrics": np.array(list(metrics)),
        "rewards": jnp.stack(
            [
                groups.reward.optimization,
                groups.reward.structure_discovery,
                groups.reward.parent_intervention,
                groups.reward.total,
            ]
        ),
        "candidates": groups.value,
    }


def campaigns() -> dict:
    """The expert's beliefs and choices, and what every method recommends after each experiment."""
    prior = SCMPrior(max_vars=5, min_size=5, max_size=5)
    bins = SHIPPED.surrogate.config.num_bins
    problems = draw_problems(jr.key(4), 2, prior, DataDesign(40, 40, 2, num_steps=3), bins)
    given = jr.split(jr.key(5), 2), problems.scm, problems.buffer
    found = {"optima": optima(problems.scm)}
    for name in METHODS:
        played = play(name, SHIPPED, *given, num_obs=40, num_steps=3)
        found[f"method/{name}"] = played["recommended"]
    first = jax.tree.map(lambda leaf: leaf[0], given)
    run = eqx.filter_jit(run_parent_scale)(*first, ParentScaleConfig(num_obs=40, num_steps=3))
    return found | {
        "expert/probs": jnp.exp(run.log_probs),
        "expert/surface": run.surface,
        "expert/value": run.value,
        "expert/outcome": run.outcome,
    }


def answer() -> dict:
    """Numbers of the shipped system's answer on the example."""
    script, folder = importlib.import_module("06_deploy"), ROOT / "examples"
    settings = dict(objective="max", bounds=folder / "bounds.csv")
    found = script.suggest(script.Suggest(folder / "experiments.csv", "yield", **settings))
    numbers = {"suggest/parents": np.array([p for _, p in sorted(found["parents"].items())])}
    for name in ("next_experiment", "recommended_action"):
        action = found[name]
        values = *action["settings"].values(), *(action[k] for k in ("predicted", "low", "high"))
        numbers[f"suggest/{name}"] = np.array(values)
    return numbers


PARTS = {part.__name__: part for part in (shipped, gradients, campaigns, answer, stages)}


def computed(parts: list[str]) -> dict[str, np.ndarray]:
    """What `parts` give in this tree, without what they print."""
    found = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for part in parts:
            found |= {name: np.asarray(x) for name, x in PARTS[part]().items()}
            jax.clear_caches()  # the programs of all parts are more than a process may map
    return found


def of_commit(commit: str, parts: list[str]) -> dict[str, np.ndarray]:
    """What the guard of `commit` gives, by its own code."""
    with tempfile.TemporaryDirectory() as folder:
        tree, git = Path(folder) / "tree", ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            there = tree / "tests" / "cases" / "guard.py"
            subprocess.run([sys.executable, str(there), "--store", *parts], check=True, cwd=tree)
            with np.load(there.with_suffix(".npz")) as file:
                return dict(file)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def compare(before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> int:
    """Print the largest differences; how many lie beyond their tolerance."""
    worst = [(np.inf, 0.0, f"{name} is gone") for name in before.keys() - now.keys()]
    worst += [(np.inf, 0.0, f"{name} is new") for name in now.keys() - before.keys()]
    for name in before.keys() & now.keys():
        a, b, error = before[name].astype(float), now[name].astype(float), np.inf
        finite = np.isfinite(a)
        if np.array_equal(finite, np.isfinite(b)):  # and of the same shape
            error = np.max(np.abs(a[finite] - b[finite]) / (1.0 + np.abs(a[finite])), initial=0.0)
        worst.append((error, 1e-4 if name.startswith(TRAINING) else 1e-5, name))
    for error, allowed, name in sorted(worst, reverse=True)[:12]:
        print(f"{error:.1e}  {name}" + ("" if error <= allowed else "  BEYOND"))
    bad = sum(error > allowed for error, allowed, _ in worst)
    print(f"{len(worst)} compared, {bad} beyond their tolerance")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if left out")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--against", metavar="COMMIT", help="compare with this commit")
    what.add_argument("--store", action="store_true", help=f"write {STORED.name} only")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    parts = args.parts or list(PARTS)
    if args.store:
        np.savez_compressed(STORED, **computed(parts))
        return 0
    return int(compare(of_commit(args.against, parts), computed(parts)) > 0)


if __name__ == "__main__":
    sys.exit(main())
