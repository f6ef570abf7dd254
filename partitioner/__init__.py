"""A model in, head / tail pairs out: sources, export, cuts, cutting, and the proof that head then tail is the whole."""

from dsc_split.partitioner._export import ExportOptions, export_bundle
from dsc_split.partitioner._load import list_cuts, load_model
from dsc_split.partitioner._recut import bundle_cuts, cut_bundle
from dsc_split.partitioner.cuts._find import Cut, CutList, CutTensor, find_cuts
from dsc_split.partitioner.cuts._select import CutOptions, select_cuts
from dsc_split.partitioner.sources._options import LoadedModel, SourceOptions

__all__ = [
    "Cut",
    "CutList",
    "CutOptions",
    "CutTensor",
    "ExportOptions",
    "LoadedModel",
    "SourceOptions",
    "bundle_cuts",
    "cut_bundle",
    "export_bundle",
    "find_cuts",
    "list_cuts",
    "load_model",
    "select_cuts",
]
