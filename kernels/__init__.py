"""Accelerated operations, one folder each: reference, api, one file per backend."""
