"""Reports for people: what a model is made of (`summary`), what a step computes (`flops`), and where a run's time went (`wall_time`)."""

from fnlight.report.flops import PEAKS, Device, flops, peak_flops
from fnlight.report.model import ModelSummary, ModuleRow, summary
from fnlight.report.wall_time import RunReport, wall_time

__all__ = ["PEAKS", "Device", "ModelSummary", "ModuleRow", "RunReport", "flops", "peak_flops", "summary", "wall_time"]
