"""Writing a model in another format, or with fewer bits to a weight."""

from kuiperllm.engine.export.exporting import export
from kuiperllm.engine.export.report import ExportReport

__all__ = ["ExportReport", "export"]
