"""The reward service: retrieval metrics of generated attributes, measured by a pool of Ray actors.

`client` asks, `actor` answers, `batching` cuts queries into requests, `scoring` encodes and ranks, `metrics` counts,
`spec` is the plain data that travels between them.
"""
