"""`rhumb train`, `evaluate`, `report`, `quantize`, `study`: what each makes of its options, and of none.

What a command calls is replaced by something that keeps its arguments, so that nothing is trained or measured.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import models.evaluate as evaluation
import models.qama.train as adapters
import models.quantizers.compare as comparing
import models.quantizers.report as reporting
import models.retriever.train as training
import models.study.quick as quick
import models.study.report as pages
import models.study.runner as runner
from models.comparison import CascadeRow, Comparison, Row
from models.measures import MEASURES
from models.quantizers.compare import SHOWN, Compared
from models.retriever.recipe import load_recipe
from models.study.plan import QUICK, SHIPPED, load_plan
from models.task import Settings

Calls = list[dict[str, Any]]
Record = Callable[..., Calls]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    """Replace a function of a module; gives the arguments of each call, by name, those left to defaults too."""

    def record(module: ModuleType, name: str, result: Any = None) -> Calls:
        calls: Calls = []
        signature = inspect.signature(getattr(module, name))

        def keep(*arguments: Any, **named: Any) -> Any:
            bound = signature.bind(*arguments, **named)
            bound.apply_defaults()
            calls.append(dict(bound.arguments))
            return result

        monkeypatch.setattr(module, name, keep)
        return calls

    return record


@pytest.fixture
def rhumb(run: Any) -> Callable[..., str]:
    """Call a command that succeeds; gives what it prints."""

    def rhumb(*words: object) -> str:
        code, out, err = run(*map(str, words))
        assert code == 0, err
        return str(out)

    return rhumb


def test_a_training_is_what_its_options_say(record: Record, rhumb: Any, tmp_path: Path) -> None:
    """Zeros count as given: of a recipe with another seed, and with ten earlier items."""
    shipped = Path(training.__file__).parents[1] / "recipes" / "dgi.toml"
    (tmp_path / "mine.toml").write_text(f"seed = 5\n{shipped.read_text()}")
    calls = record(training, "run")
    command = ["train", "one", "two", "--recipe", tmp_path / "mine.toml", "--out", tmp_path / "out"]
    rhumb(*command, "--encoder", "some/encoder", "--device", "cuda:1", "--seed", 7, "--history", 3, "--no-resume")
    rhumb(*command, "--seed", 0, "--history", 0)
    rhumb(*command)
    recipes = [call.pop("recipe").model_dump() for call in calls]
    plain = load_recipe("dgi").model_dump()
    assert recipes == [
        plain | {"seed": seed, "text": plain["text"] | {"history_count": items}, "encoder": plain["encoder"] | encoder}
        for seed, items, encoder in ((7, 3, {"name": "some/encoder"}), (0, 0, {}), (5, 10, {}))
    ]
    given = {"folders": [Path("one"), Path("two")], "out": tmp_path / "out"}
    assert calls == [given | {"device": "cuda:1", "resume": False}, *[given | {"device": "cpu", "resume": True}] * 2]


def test_a_training_without_options_is_the_default_recipes(record: Record, rhumb: Any) -> None:
    calls = record(training, "run")
    rhumb("train", "data", "--out", "out")
    (call,) = calls
    assert call.pop("recipe").model_dump() == load_recipe("combined").model_dump()
    assert call == {"folders": [Path("data")], "out": Path("out"), "device": "cpu", "resume": True}


def test_an_adapter_is_trained_as_its_options_say(record: Record, rhumb: Any) -> None:
    calls = record(adapters, "run", Path("out/model"))
    command = ["train", "one", "two", "--recipe", "qama", "--out", "out"]
    assert rhumb(*command, "--model", "served", "--seed", 7, "--no-resume") == "out/model\n"
    rhumb(*command)
    given = {"recipe_path": "qama", "data": [Path("one"), Path("two")], "out": Path("out"), "quiet": False}
    assert calls == [
        given | {"model": Path("served"), "seed": 7, "resume": False},
        given | {"model": None, "seed": None, "resume": True},
    ]


def compared(cascades: int) -> Comparison:
    row = Row("walk", dict.fromkeys(MEASURES, 0.5))
    cascade = CascadeRow("1", 64, 1, 6, 0.1, 0.9)
    return Comparison("bundle", "digest", "data", "dev", 9, 3, 0, rows=[row], cascades=[cascade] * cascades)


def test_an_evaluation_asks_what_its_options_say(record: Record, rhumb: Any, tmp_path: Path) -> None:
    calls = record(evaluation, "evaluate", compared(cascades=1))
    out = rhumb(
        "evaluate", "bundle", "--data", "data", "--split", "dev", "--scoring", "guided", "--scoring", "geometric",
        "--ranking", "sampled", "--ranking", "fused", "--beam", 7, "--beam", 3, "--no-baselines", "--no-codes",
        "--untuned", "other", "--free-queries", 11, "--batch", 13, "--limit", 17, "--threads", 2, "--runs", "trec",
        "--json", tmp_path / "r.json", "--markdown", tmp_path / "r.md",
    )  # fmt: skip
    settings = Settings(
        split="dev", scorings=("guided", "geometric"), rankings=("sampled", "fused"), beams=(7, 3), baselines=False,
        codes=False, untuned=Path("other"), free_queries=11, batch=13, limit=17, threads=2, runs=Path("trec"),
    )  # fmt: skip
    assert calls == [{"bundle_path": Path("bundle"), "data": Path("data"), "settings": settings, "observe": None}]
    assert "data dev: 3 queries, 9 documents" in out
    assert "prefix cascades" in out
    assert json.loads((tmp_path / "r.json").read_text())["split"] == "dev"
    assert (tmp_path / "r.md").read_text() == compared(cascades=1).as_markdown()


def test_an_evaluation_without_options_asks_for_everything(record: Record, rhumb: Any) -> None:
    """And with one that leaves something out, for everything else."""
    calls = record(evaluation, "evaluate", compared(cascades=0))
    assert "cascades" not in rhumb("evaluate", "bundle", "--data", "data")
    rhumb("evaluate", "bundle", "--data", "data", "--no-codes")
    assert [call["settings"] for call in calls] == [Settings(), Settings(codes=False)]


@pytest.fixture
def report(rhumb: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Report on codes of four documents, two of them on one ID; gives what is written as JSON."""
    np.save(tmp_path / "codes.npy", np.array([[0, 0], [0, 1], [1, 2], [1, 2]]))
    (tmp_path / "ids.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "counts.tsv").write_text("c\t6\na\t2\n")

    def report(*options: object) -> dict[str, Any]:
        assert "p_unique" in rhumb("report", tmp_path / "codes.npy", *options, "--json", tmp_path / "report.json")
        return dict(json.loads((tmp_path / "report.json").read_text()))

    return report


def test_a_report_measures_with_the_sizes_ids_and_interactions_it_is_given(
    record: Record, report: Any, tmp_path: Path
) -> None:
    drawn = record(reporting, "plot_report")
    files = ["--ids", tmp_path / "ids.txt", "--interactions", tmp_path / "counts.tsv", "--plot", tmp_path / "r.png"]
    found = report("--level-sizes", "4,8", *files)
    assert [level["codes"] for level in found["levels"]] == [4, 8]
    assert found["groups"]["head"]["interaction_share"] == 0.75
    assert found["groups"]["head"]["unique_share"] == 0, "the document of the most interactions shares its ID"
    assert [(call["quality"].documents, call["path"]) for call in drawn] == [(4, tmp_path / "r.png")]


def test_a_report_without_options_takes_the_largest_codes_for_the_sizes(record: Record, report: Any) -> None:
    drawn = record(reporting, "plot_report")
    found = report()
    assert [level["codes"] for level in found["levels"]] == [2, 3]
    assert not found["groups"]
    assert not drawn


def test_interactions_of_codes_without_ids_are_refused_with_the_remedy(run: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "codes.npy", np.zeros((2, 2), np.int32))
    (tmp_path / "counts.tsv").write_text("a\t5\n")
    code, _, error = run("report", str(tmp_path / "codes.npy"), "--interactions", str(tmp_path / "counts.tsv"))
    assert code == 1
    assert "interactions need document ids: give a bundle, or ids with --ids" in error


def test_quantizers_are_compared_as_the_options_say(record: Record, rhumb: Any, tmp_path: Path) -> None:
    """Every file is compared by itself, and one table holds the rows of all."""
    row = Compared("corpus", "hhq", 6, 4, 2, (0.5,), (0.25,), (0.1, 0.2))
    calls, drawn = record(comparing, "compare", [row]), record(comparing, "plot")
    out = rhumb(
        "quantize", "one.npy", "two.npy", "--system", "dgi", "--system", "hhq", "--codes", 16, "--codes", 8,
        "--levels", 3, "--levels", 2, "--dims", 6, "--dims", 5, "--seed", 9, "--seed", 0,
        "--markdown", tmp_path / "table.md", "--plot", tmp_path / "plot.png",
    )  # fmt: skip
    given = {"systems": ["dgi", "hhq"], "codes": [16, 8], "levels": [3, 2], "seeds": [9, 0], "dims": [6, 5]}
    assert calls == [given | {"path": Path("one.npy")}, given | {"path": Path("two.npy")}]
    assert out.count("0.5000") == 2
    assert (tmp_path / "table.md").read_text() == comparing.as_markdown([row, row])
    assert drawn == [{"rows": [row, row], "path": tmp_path / "plot.png"}]


def test_quantizers_are_compared_at_four_levels_of_128_and_256_codes(record: Record, rhumb: Any) -> None:
    calls, drawn = record(comparing, "compare", []), record(comparing, "plot")
    rhumb("quantize", "one.npy")
    defaults = {"systems": SHOWN, "codes": [128, 256], "levels": [4], "seeds": [0], "dims": []}
    assert calls == [{"path": Path("one.npy")} | defaults]
    assert not drawn


def test_quantizers_are_fitted_to_a_file_of_vectors(rhumb: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(40, 6)))
    options = ["--system", "rq_kmeans", "--codes", 4, "--levels", 2, "--dims", 5, "--markdown", tmp_path / "table.md"]
    assert "rq_kmeans" in rhumb("quantize", tmp_path / "rows.npy", *options)
    assert "| rq_kmeans | 5 | 4 | 2 |" in (tmp_path / "table.md").read_text()


def test_a_study_is_what_its_options_say(record: Record, rhumb: Any, tmp_path: Path) -> None:
    """Its page and figures lie where `--report` says, its trainings in `--out`."""
    text = QUICK.read_text().replace("\nseeds = [", "\nseeds = [77, ")
    (tmp_path / "plan.toml").write_text(text)
    plan = load_plan(tmp_path / "plan.toml")
    assert 77 in plan.seeds
    studies, written = record(runner, "run_study"), record(pages, "write_report")
    page = tmp_path / "pages" / "mine.md"
    out = rhumb(
        "study", "--out", "out", "--data", "data", "--encoder", "some/encoder", "--plan", tmp_path / "plan.toml",
        "--report", page, "--device", "cuda:1", "--only", "one", "--only", "two",
    )  # fmt: skip
    (study,) = studies
    study.pop("after")({"one": {}})
    assert study == {
        "plan": plan, "data": Path("data"), "encoder": "some/encoder", "out": Path("out/cells"),
        "figures": page.with_name("mine-figures"), "device": "cuda:1", "only": ["one", "two"],
    }  # fmt: skip
    command = "make results ARGS='--data DATA --encoder ENCODER --plan PLAN --report PAGE'"
    assert written == [{"plan": plan, "results": {"one": {}}, "path": page, "command": command}]
    assert out == f"{page}\n"


@pytest.mark.parametrize(
    ("options", "plan", "data", "given"),
    [
        (["--data", "data", "--encoder", "data/encoder"], SHIPPED, "data", "--data DATA --encoder ENCODER"),
        (["--quick"], QUICK, "made", "--quick"),
        (["--quick", "--plan", str(SHIPPED)], SHIPPED, "made", "--quick --plan PLAN"),
    ],
)
def test_a_study_without_options_is_the_shipped_or_the_quick_one(
    record: Record, rhumb: Any, options: list[str], plan: Path, data: str, given: str
) -> None:
    made = record(quick, "write_quick", (Path("made"), "made/encoder"))
    studies, written = record(runner, "run_study"), record(pages, "write_report")
    assert rhumb("study", "--out", "out", *options) == "out/systems.md\n"
    (study,) = studies
    study.pop("after")({})
    assert study == {
        "plan": load_plan(plan), "data": Path(data), "encoder": f"{data}/encoder", "out": Path("out/cells"),
        "figures": Path("out/systems-figures"), "device": "cpu", "only": (),
    }  # fmt: skip
    command = f"make results ARGS='{given}'"
    assert written == [{"plan": load_plan(plan), "results": {}, "path": Path("out/systems.md"), "command": command}]
    assert made == [{"out": Path("out")}] * ("--quick" in options)


@pytest.mark.parametrize("options", [[], ["--data", "data"], ["--encoder", "some/encoder"]])
def test_a_study_without_data_or_encoder_is_refused(record: Record, run: Any, options: list[str]) -> None:
    studies = record(runner, "run_study")
    code, _, err = run("study", "--out", "out", *options)
    assert code == 2
    assert "--data and --encoder are needed, unless the study is --quick" in err
    assert not studies
