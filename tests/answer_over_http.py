"""Index, serve and ask every model that a study trained: python -m tests.answer_over_http OUT [DATA].

DATA is the folder of a data set in the BEIR layout; without it, the quick study's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np

from models.data import load_dataset, vectors_file
from models.quantizers.report import load_sids
from service.index.build import build_bundle
from service.index.bundle import open_bundle
from service.search.pipeline import Pipeline
from tests.service.http.fakes import running

ASKED = 5


def main(out: Path, folder: Path) -> None:
    """Ask all models of a data set the first of its test queries, with every scoring that they offer."""
    models = sorted(out.glob(f"cells/{folder.name}/*/*/run/model*"))
    assert models, f"{out} holds no model of {folder.name}: run a study into it first"
    data = load_dataset(folder, ["test"])
    queries = [data.queries[query] for query in data.judged("test")[:ASKED]]
    texts = {document.id: document.text for document in data.documents}
    for number, model in enumerate(models):
        bundle = out / "asked" / str(number)
        vectors = vectors_file(model.parent, folder)
        given = np.load(vectors, allow_pickle=False) if vectors.is_file() else None
        build_bundle(model, data.documents, bundle, vectors=given, replace=True, progress=False)
        sids = load_sids(bundle)
        codes = dict(zip(sids.ids or [], sids.codes.tolist(), strict=True))
        with running(Pipeline(open_bundle(bundle), 1)) as (url, _, _):
            info = httpx.get(f"{url}/info", timeout=60).json()
            for scoring in info["scorings"]:
                for query in queries:
                    check_answer(url, {"query": query, "scoring": scoring}, codes, texts)
        print(f"{info['recipe']} answers: {', '.join(info['scorings'])}", flush=True)


def check_answer(url: str, asked: dict[str, str], codes: dict[str, list[int]], texts: dict[str, str]) -> None:
    """Ask for five documents: they have the semantic IDs that the index gave them, and the first its text."""
    answer = httpx.post(f"{url}/v1/search", json={**asked, "top_k": 5, "include": ["codes"]}, timeout=60)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert len(results) == 5, results
    for result in results:
        assert [c for c in result["codes"] if c >= 0] == [c for c in codes[result["id"]] if c >= 0], result
    stored = httpx.get(f"{url}/v1/documents/{quote(results[0]['id'])}", timeout=60)
    assert stored.json()["text"] == texts[results[0]["id"]], stored.text


if __name__ == "__main__":
    study = Path(sys.argv[1])
    main(study, Path(sys.argv[2]) if len(sys.argv) > 2 else study / "quick" / "data" / "topics")
