"""All benchmarks of stage 1 in one table; those whose peer is not installed are left out, with a message."""

from __future__ import annotations

import sys

from jobs.benchmarks.harness import run_parts

PARTS = ("agcl_loss", "bm25", "agcl_step", "agcl_train", "agcl_memory", "retrieval")
PEERS = ("sentence_transformers", "bm25s", "faiss")

if __name__ == "__main__":
    sys.exit(run_parts("agcl", __doc__ or "", PARTS, peers=PEERS))
