"""The study behind the claims: quality of codes on real data sets, beside baselines, ablation and storage.

    python -m models.qama.study --data FOLDER --out runs/qama            all figures, three seeds
    python -m models.qama.study --data FOLDER --out runs/qama --quick    a few minutes, for a look and for tests

Every trained adapter is a cell `OUT/<set>/<variant>/<seed>/`, with its scores beside it. A second call trains what is
missing only; a cell whose recipe or data changed is trained anew. Training never sees test queries: train queries that
have the text of one are left out, and the tables say how many.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.kept import keep_if_same, save_json
from models.qama.batches import TrainVectors
from models.qama.checkpoint import fingerprint
from models.qama.measure import Judged, Score, baseline, float_baselines, measure
from models.qama.recipe import AdapterRecipe, load_recipe, parse_recipe
from models.qama.study_data import StudySet, load_set, subset
from models.qama.study_plot import plot_quality
from models.qama.study_report import Results, render
from models.qama.train import CHECKPOINT_NAME, train_adapter
from models.qama.variants import Variant, ablation_variants, main_variants, with_seed
from service.model.binarizer import Binarizer
from service.ops.progress import progress_bar

SETS = ("scifact", "tldr", "cosqa")
SCORES_NAME = "scores.json"
QUICK = {"documents": 400, "queries": 60, "steps": 8}


@dataclass(frozen=True)
class Plan:
    """What to run."""

    sets: tuple[str, ...]
    seeds: int
    recipe: AdapterRecipe
    ablation: bool
    quick: bool = False

    def variants(self) -> list[Variant]:
        """Rows to train, in the order of the tables."""
        rows = main_variants(self.recipe)
        return [*rows, *ablation_variants(self.recipe)] if self.ablation else rows


def run_study(data: Path, out: Path, plan: Plan, command: str, quiet: bool = False) -> Results:
    """Train and measure everything that is missing, and write `results.json`, `results.md` and `quality.png` to `out`.

    Args:
        data: folder with a folder for each set.
        out: where cells and results go.
        plan: what to run.
        command: is named at the top of the tables.
        quiet: no progress bars.
    """
    variants = plan.variants()
    results = Results(command, plan.recipe.network.prefixes, {}, {}, {}, {}, {v.key: v.title for v in variants})
    with progress_bar("study", len(plan.sets) * len(variants) * plan.seeds, quiet) as advance:
        for name in plan.sets:
            found = load_set(data / name, out / "vectors")
            if plan.quick:
                found = subset(found, QUICK["documents"], QUICK["queries"])
            results.left_out[name] = found.left_out
            results.fp32[name] = baseline(found.test)
            results.floats[name] = float_baselines(found.test)
            for variant in variants:
                for seed in range(plan.seeds):
                    scores = run_cell(found, variant, seed, out / name / variant.key / str(seed))
                    results.cells.setdefault(variant.key, {}).setdefault(name, []).append(scores)
                    advance(1)
    write_results(results, out)
    return results


def run_cell(data: StudySet, variant: Variant, seed: int, folder: Path) -> list[Score]:
    """Train and measure one adapter, or read what an earlier call measured; an interrupted one goes on."""
    recipe = with_seed(variant.recipe, seed)
    vectors = data.train if variant.queries else data.without_queries()
    keep_if_same(folder, _cell_fingerprint(recipe, vectors, data.test))
    path = folder / SCORES_NAME
    if path.is_file():
        return [Score(**score) for score in json.loads(path.read_text())]
    adapter = train_adapter(
        vectors.documents, vectors.queries, recipe, folder, pairs=vectors.pairs, resume=True, quiet=True
    )
    scores = list(measure(Binarizer.open(adapter), data.test))
    (folder / CHECKPOINT_NAME).unlink(missing_ok=True)  # its moments are twice the adapter's size
    save_json(path, [score._asdict() for score in scores])
    return scores


def _cell_fingerprint(recipe: AdapterRecipe, train: TrainVectors, test: Judged) -> str:
    """Hex SHA-256 over the recipe, what it learns from and what it is measured on."""
    digest = hashlib.sha256(fingerprint(recipe, train).encode())
    for array in (test.documents, test.queries):
        digest.update(array.tobytes())
    digest.update(repr([sorted(relevant.items()) for relevant in test.grades]).encode())
    return digest.hexdigest()


def write_results(results: Results, out: Path) -> None:
    """Write tables, JSON and plot."""
    (out / "results.json").write_text(json.dumps(results.to_json(), indent=1))
    (out / "results.md").write_text(render(results), encoding="utf-8")
    plot_quality(results, out / "quality.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(prog="python -m models.qama.study", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds a folder for each set")
    parser.add_argument("--out", type=Path, default=Path("runs/qama"), help="where cells and results go")
    parser.add_argument("--sets", default=",".join(SETS), help="sets, by comma")
    parser.add_argument("--seeds", type=int, default=3, help="adapters of every row")
    parser.add_argument("--recipe", default="qama", help="name or TOML file")
    parser.add_argument("--no-ablation", action="store_true", help="headline, dimensions and storage only")
    parser.add_argument("--quick", action="store_true", help="small cuts of the sets and few steps")
    parser.add_argument("--report", type=Path, help="copy tables and plot there too (a .md file)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # small matrices: more threads cost more than they give, and results would depend on them
    recipe = load_recipe(given.recipe)
    seeds = given.seeds
    if given.quick:
        recipe, seeds = quick_recipe(recipe), 1
    plan = Plan(tuple(given.sets.split(",")), seeds, recipe, not given.no_ablation, given.quick)
    results = run_study(given.data, given.out, plan, command_line(given))
    if given.report:
        given.report.parent.mkdir(parents=True, exist_ok=True)
        plot = given.report.with_suffix(".png")
        plot_quality(results, plot)
        given.report.write_text(render(results, plot.name), encoding="utf-8")
    print(f"wrote {given.out / 'results.md'}", file=sys.stderr)


def quick_recipe(recipe: AdapterRecipe) -> AdapterRecipe:
    """The recipe with few steps on small batches: it shows that everything runs, not what it is worth."""
    fields = recipe.model_dump()
    fields["train"] |= {"steps": QUICK["steps"]}
    fields["batch"] |= {"documents": 64, "groups": 8, "queries": 32, "neighbours": 16}
    return parse_recipe(fields)


def command_line(given: argparse.Namespace) -> str:
    """The command that makes these results, without the paths of this machine."""
    words = ["python -m models.qama.study --data DATA --out runs/qama"]
    if given.sets != ",".join(SETS):
        words.append(f"--sets {given.sets}")
    if given.seeds != 3:
        words.append(f"--seeds {given.seeds}")
    if given.recipe != "qama":
        words.append(f"--recipe {Path(given.recipe).name}")
    words += ["--no-ablation"] * given.no_ablation + ["--quick"] * given.quick
    return " ".join(words)


if __name__ == "__main__":
    main()
