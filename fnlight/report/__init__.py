"""Reports: the modules and parameters of a model (`summary`), the operations of a step (`flops`), and the time of a run by cause (`wall_time`)."""

from fnlight.report.flops import PEAKS, Device, flops, peak_flops
from fnlight.report.model import ModelSummary, ModuleRow, summary
from fnlight.report.wall_time import RunReport, wall_time

__all__ = ["PEAKS", "Device", "ModelSummary", "ModuleRow", "RunReport", "flops", "peak_flops", "summary", "wall_time"]
