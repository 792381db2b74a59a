"""Benchmark data: records, and the tables and files they are read from."""

from mipfast.data.benchmarks import load, load_groups, person_names, without_pictures
from mipfast.data.encoder import labelled
from mipfast.data.jsonl import read_lines
from mipfast.data.records import Picture, Record

__all__ = ["Picture", "Record", "labelled", "load", "load_groups", "person_names", "read_lines", "without_pictures"]
