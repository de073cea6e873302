"""The command `slime`."""

import importlib
import sys
from collections.abc import Sequence

from slime.cli.driver import EXIT_USAGE, run_driver
from slime.cli.flag_table import flags_json, flags_markdown, flags_text

_USAGE = """\
usage: slime COMMAND ...

  train ...        the same as python train.py ...; train --help lists the flags
  train-async ...  the same as python train_async.py ...
  ledger RUN       prove that no sample of a run was lost, doubled or trained twice
  check ...        judge the flags of train.py without starting anything; check --help tells more
  model-args DIR   the model's flags, from the config.json of a Hugging Face folder
  report RUN ...   write one HTML page that shows a run, or compares several
  flags            the state of every flag; --markdown and --json write docs and the frozen list
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command `slime`."""
    words = list(sys.argv[1:] if argv is None else argv)
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command == "train":
        return _run_script("train", rest)
    if command == "train-async":
        return _run_script("train_async", rest)
    if command == "check":
        from slime.cli.check import run_check  # the data's readers: other commands do without

        return run_check(rest)
    if command == "flags":
        return _show_flags(rest)
    if command == "ledger":
        from slime.cli.ledger import show_ledger

        return show_ledger(rest)
    if command == "model-args":
        from slime.cli.model_args import show_model_args

        return show_model_args(rest)
    if command == "report":
        from slime.cli.report import report

        return report(rest)
    if command in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0
    sys.stderr.write(f"slime: unknown command {command!r}\n{_USAGE}")
    return EXIT_USAGE


def _run_script(module_name: str, argv: list[str]) -> int:
    """Run the loop of train.py or train_async.py, which stand beside the package."""
    sys.path.insert(0, ".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        sys.stderr.write(
            f"slime: there is no {module_name}.py in this folder; run it where it stands\n"
        )
        return EXIT_USAGE
    return run_driver(module.train, argv)


def _show_flags(argv: list[str]) -> int:
    writers = {"": flags_text, "--markdown": flags_markdown, "--json": flags_json}
    choice = " ".join(argv)
    if choice not in writers:
        sys.stderr.write(f"slime flags takes --markdown or --json, found {choice!r}\n")
        return EXIT_USAGE
    sys.stdout.write(writers[choice]())
    return 0
