"""The run report: one self-contained HTML file, and the headline figure. Needs the run folder, not a model."""

from opdkit.reporting.compare import write_comparison
from opdkit.reporting.page import write_report
from opdkit.reporting.sections.headline import headline_figure

__all__ = ["headline_figure", "write_comparison", "write_report"]
