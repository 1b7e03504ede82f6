"""FAISS indexes over unit vectors: exact, HNSW or IVF, on disk and memory-mapped."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from afmrl_ray.config.index import IndexConfig

Kind = Literal["exact", "hnsw", "ivf"]

_EXACT_UP_TO = 10_000
"""Allowed rows up to which an approximate index compares a query with all of them: its recall among few is low."""


def chosen_kind(config: IndexConfig, count: int) -> Kind:
    """The kind of index for `count` items; resolves `kind: auto`."""
    if config.kind != "auto":
        return config.kind
    return "exact" if count <= config.exact_up_to else "hnsw"


def build_index(vectors: np.ndarray, config: IndexConfig) -> Any:
    """A FAISS index whose ids are the rows of `vectors`, by inner product.

    Args:
        vectors: [N, D] float32, of unit length.
        config: kind and build parameters of the index.
    """
    import faiss

    count, dimensions = vectors.shape
    kind = chosen_kind(config, count)
    if kind == "exact":
        index = faiss.IndexFlatIP(dimensions)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimensions, config.hnsw_links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = config.hnsw_build
    else:
        # FAISS asks for at least 39 training vectors per cell.
        cells = max(1, min(config.ivf_lists, count // 39))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, cells, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return index


def save_index(index: Any, path: str) -> None:
    """Write an index to a local file."""
    import faiss

    faiss.write_index(index, path)


def open_index(path: str) -> Any:
    """Open an index in a local file, memory-mapped where its kind supports it."""
    import faiss

    return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)


def search_index(
    index: Any, queries: np.ndarray, k: int, config: IndexConfig, *, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the best rows of each query.

    Args:
        index: from `build_index` or `open_index`.
        queries: [Q, D] float32.
        k: number of rows per query.
        config: search parameters of an approximate index.
        allowed: bool [N], the rows that may be returned; none = all.

    Returns:
        Scores [Q, k] and rows [Q, k]; a row is -1 where fewer than k were found.
    """
    import faiss

    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if not isinstance(index, faiss.IndexFlat) and allowed is not None and allowed.sum() <= _EXACT_UP_TO:
        return _search_exact(index, queries, k, np.flatnonzero(allowed))
    settings: dict[str, Any] = {}
    if allowed is not None:
        # FAISS keeps only a pointer, so this frame must hold the array.
        bits = np.packbits(allowed, bitorder="little")
        settings["sel"] = faiss.IDSelectorBitmap(bits)
    if isinstance(index, faiss.IndexHNSW):
        parameters = faiss.SearchParametersHNSW(efSearch=max(config.hnsw_search, k), **settings)
    elif isinstance(index, faiss.IndexIVF):
        parameters = faiss.SearchParametersIVF(nprobe=config.ivf_probes, **settings)
    else:
        parameters = faiss.SearchParameters(**settings)
    return index.search(queries, k, params=parameters)


def stored_vectors(index: Any, rows: np.ndarray) -> np.ndarray:
    """[R, D] float32 vectors stored in rows [R] of an index."""
    import faiss

    if isinstance(index, faiss.IndexIVF) and index.direct_map.type == faiss.DirectMap.NoMap:
        index.make_direct_map()
    return index.reconstruct_batch(rows.astype(np.int64)) if len(rows) else np.empty((0, index.d), np.float32)


def _search_exact(index: Any, queries: np.ndarray, k: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact search among rows [R]."""
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    found = np.full((len(queries), k), -1, dtype=np.int64)
    all_scores = queries @ stored_vectors(index, rows).T
    best = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    scores[:, : best.shape[1]] = np.take_along_axis(all_scores, best, axis=1)
    found[:, : best.shape[1]] = rows[best]
    return scores, found


def recall_against_exact(index: Any, vectors: np.ndarray, config: IndexConfig, *, k: int, seed: int) -> float:
    """Recall@k of an index against exact search, for queries drawn from its own vectors.

    Args:
        index: from `build_index`.
        vectors: [N, D] vectors of the index.
        config: search parameters, and the number of queries.
        k: depth.
        seed: of the draw of queries.
    """
    import faiss

    count = min(config.recall_queries, len(vectors))
    drawn = np.random.default_rng(seed).choice(len(vectors), count, replace=False)
    k = min(k, len(vectors))
    exact = faiss.IndexFlatIP(vectors.shape[1])
    exact.add(vectors)
    wanted = exact.search(vectors[drawn], k)[1]
    found = search_index(index, vectors[drawn], k, config)[1]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(wanted.tolist(), found.tolist(), strict=True)]))
