"""What judges are made of (docs/judge.md). `rs_gguf.judges.registry` opens one by its name.

judge: the protocol, and judgements by rule. rubric: what counts as a refusal, and the texts judges read.
local, votes, endpoint: the kinds of judge. probe, calibration: the classifier of the embedded judge, how it
is fitted, and how any judge is compared with labels. cache: judgements that were made before.
"""
