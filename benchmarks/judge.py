"""Judgements per second: this project's batches against llama-cpp-python's label log-probabilities.

The same model, the same labelled pairs, the same few-shot text, the same verdict by the log-odds of the label
words. The peer is used well: one context that is kept, `logits_all=True` as its log-probabilities need, all
cores, one token an answer, its own prefix match reusing the few-shot part from call to call. The rubric's
examples stand in the user's message on its side, so both read the same text, but for the peer's chat markers.
Which verdicts agree is printed too, so that neither side can be fast by being wrong.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
import warnings
from typing import Any

import llama_cpp

from rs_gguf import models
from rs_gguf.judge_endpoint import label_confidence
from rs_gguf.judge_probe import LabelledPair, labelled_pairs
from rs_gguf.endpoint_http import Token
from rs_gguf.judges import Judge, LabelJudge, open_judge, verdict_tokens
from rs_gguf.llama import LlamaModel
from rs_gguf.prompts import Prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
