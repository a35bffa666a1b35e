"""Judges grade answers (docs/judge.md). `rs_gguf.judges.registry` opens one by its name.

judge: the protocol, and judgements by rule. rubric: the categories, and the texts that judges read.
local, votes, endpoint: the kinds of judge. probe: the classifier of the embedded judge. calibration: its fit,
and the agreement of any judge with labels. cache: judgements that are kept.
"""

FORMS = ("MODEL", "labels:MODEL", "votes:MODEL", "http://host:port/v1#model", "keywords")
"""What names a judge, for the help: the registry is too slow to import there."""
