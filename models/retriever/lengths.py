"""How many documents may share a SID, asked of held-out queries at the end of training (ours; SA2CRQ fixes its budget).

A path that ends early is easier to find, and leaves the choice among its documents to the cosine with the query. Which
is better depends on the data: where queries say what a document is about, cosine chooses well; where they are what
somebody bought before, it does not. The decoder is trained on paths that go on until documents are alone; every shorter
SID is the beginning of one of these, so the same decoder serves all lengths.
"""

from __future__ import annotations

from models.quantizers.sarq import SARQ
from models.retriever.run import Run, make_tree
from models.retriever.stages import Work
from models.retriever.validate import walked_scores

MOST = 64  # documents that may share a SID: it shall name documents, not a cell of them
MEASURES = ("mrr", "recall")  # the first says how well documents are ordered, the second how many are found at all


def choose_lengths(run: Run, work: Work) -> None:
    """Set the lengths with the best walks on held-out queries, and the tree that follows from them.

    Tried are paths that end where 1, 2, 4, … documents are left. The sum of MRR@10 and R@10 decides, over both walks
    where a recipe trains both: MRR alone likes SIDs that hold many documents, of which cosine finds one or none.
    Without held-out queries paths go on until documents are alone. A quantizer whose recipe does not ask for it
    (`held_out`) keeps its lengths.
    """
    quantizer, held_out = run.quantizer, run.material.held_out
    if not isinstance(quantizer, SARQ) or not quantizer.settings.held_out or not held_out:
        return
    codes_NL = quantizer.full_codes(work.vectors_ND.cpu().numpy())
    chosen, best = 1, -1.0
    for holders in (1 << power for power in range(MOST.bit_length())):
        if holders > len(codes_NL):
            break
        quantizer.shorten(codes_NL, holders / len(codes_NL))
        work.tree = make_tree(run)
        found = walked_scores(work, held_out, MEASURES)
        run.log(stage=work.stage.name, documents_a_sid=holders, **found)
        if sum(found.values()) > best:
            chosen, best = holders, sum(found.values())
    quantizer.shorten(codes_NL, chosen / len(codes_NL))
    work.tree = make_tree(run)
