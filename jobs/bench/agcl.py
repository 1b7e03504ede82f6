"""All benchmarks of stage 1 in one table; those whose peer is not installed are left out, loudly."""

from __future__ import annotations

import sys

from harness import run_parts

PARTS = ("weighted_info_nce", "bm25", "agcl_step", "agcl_train", "agcl_memory", "retrieval")
PEERS = ("sentence_transformers", "bm25s", "faiss")

if __name__ == "__main__":
    sys.exit(run_parts("agcl", __doc__ or "", PARTS, peers=PEERS))
