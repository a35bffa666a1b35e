"""The stages of a run, in order."""

from rs_gguf.pipeline.stage import Stage
from rs_gguf.pipeline.stages.answers import Answers, Scores
from rs_gguf.pipeline.stages.capture import Capture
from rs_gguf.pipeline.stages.fit import Fit
from rs_gguf.pipeline.stages.measure import Measure
from rs_gguf.pipeline.stages.report import Report
from rs_gguf.pipeline.stages.tune import Tune
from rs_gguf.pipeline.stages.write import Write

IN_ORDER: tuple[Stage, ...] = (
    Answers(), Scores(), Capture(), Fit(), Tune(), Write(), Measure(), Report(),
)  # fmt: skip
