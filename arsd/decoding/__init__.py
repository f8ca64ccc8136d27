"""The decoding engine: one loop (:func:`decode`), laws, noise, rules, drafters, strategies."""

from arsd.decoding.bandit_strategies import EXP3Spec, UCBSpec
from arsd.decoding.costs import PassCosts
from arsd.decoding.frame_copy import FrameCopy
from arsd.decoding.laws import Grammar, Law, LawConfig, Laws
from arsd.decoding.layer_skip import LayerSkip
from arsd.decoding.lookup import PromptLookup
from arsd.decoding.loop import DecodeResult, decode
from arsd.decoding.mixed import build_parts
from arsd.decoding.model_strategies import Eagle, Hybrid
from arsd.decoding.noise import CounterNoise, Purpose
from arsd.decoding.recycling import TokenRecycling
from arsd.decoding.registry import register_drafter, register_rule
from arsd.decoding.relaxed_strategies import CoolSD, GroupedSD, Lantern, LanternPlusPlus, PublishedCoolSD
from arsd.decoding.siblings import SeedExactTree, SiblingSampling
from arsd.decoding.sparse_to_dense import SparseToDense
from arsd.decoding.speculative import Speculative
from arsd.decoding.stats import DecodeStats
from arsd.decoding.strategies import SJD, STRATEGIES, Autoregressive, DecodingStrategy, Setting, parse_strategy
from arsd.decoding.tree_drafter import TreeDrafter
from arsd.decoding.trees import TreeShape
from arsd.decoding.types import DecodeRequest, Draft, Outcome, Parts, Round, Step, Verdict

__all__ = [
    "CoolSD",
    "EXP3Spec",
    "GroupedSD",
    "Lantern",
    "LanternPlusPlus",
    "SJD",
    "STRATEGIES",
    "Autoregressive",
    "CounterNoise",
    "DecodeRequest",
    "DecodeResult",
    "DecodeStats",
    "DecodingStrategy",
    "Draft",
    "Eagle",
    "FrameCopy",
    "Grammar",
    "Hybrid",
    "Law",
    "LawConfig",
    "Laws",
    "LayerSkip",
    "Outcome",
    "Parts",
    "PromptLookup",
    "PassCosts",
    "PublishedCoolSD",
    "Purpose",
    "Round",
    "SeedExactTree",
    "Setting",
    "SiblingSampling",
    "SparseToDense",
    "Speculative",
    "Step",
    "TokenRecycling",
    "TreeDrafter",
    "TreeShape",
    "UCBSpec",
    "Verdict",
    "build_parts",
    "decode",
    "parse_strategy",
    "register_drafter",
    "register_rule",
]
