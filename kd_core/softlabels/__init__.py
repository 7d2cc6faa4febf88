"""The teacher's distribution, reduced by a policy, as bytes, in shards."""

from kd_core.softlabels.codec import decode_rows, encode_rows, parse_model
from kd_core.softlabels.targets import Common, DenseTargets, SampledTargets, Targets, TopKTargets, concatenate, make_targets

__all__ = [
    "Common",
    "DenseTargets",
    "SampledTargets",
    "Targets",
    "TopKTargets",
    "concatenate",
    "decode_rows",
    "encode_rows",
    "make_targets",
    "parse_model",
]
