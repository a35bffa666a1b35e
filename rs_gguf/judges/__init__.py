"""What judges are made of (docs/judge.md). `rs_gguf.judges.registry` opens one by its name.

judgement: what goes in and comes out. rubric: what counts as a refusal, and the texts judges read.
local, votes, endpoint: the kinds of judge. probe, calibration: what the embedded judge reads hidden states
with, how it is fitted and how any judge is compared with labels. client, exchange: HTTP. cache: judgements
that were made before.
"""
