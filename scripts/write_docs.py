"""Write the pages of docs/ that come from the code: flags.md and metrics.md."""

from pathlib import Path

from slime.cli.flag_table import flags_markdown
from slime.observability.metrics import metrics_markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    """Write both pages."""
    (DOCS / "flags.md").write_text(flags_markdown(), encoding="utf-8")
    (DOCS / "metrics.md").write_text(metrics_markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
