"""Train one step off: while the model trains on a round, the engines generate the next one."""

import sys

from slime.cli.driver import run_driver
from slime.config.config import Config
from slime.config.resolve import check_overlapping


def train(config: Config) -> None:
    """The one-step-off loop; weights change during a round with --update-weights-in-flight only.

    With --fully-async a round is not generated from start to end but handed out of a stream of groups.
    """
    from slime.orchestration.session import open_session  # Ray: not needed for --help and refusals

    check_overlapping(config)
    with open_session(config) as run:
        run.evaluate_first()
        num_rollout = run.config.num_rollout or 0
        first, written_by = run.first_rollout, run.first_written_by
        upcoming = run.start_generate(first, written_by) if first < num_rollout else None
        for rollout_id in range(first, num_rollout):
            assert upcoming is not None
            rollout = run.finish_generate(rollout_id, upcoming)
            is_last = rollout_id + 1 == num_rollout
            upcoming = None if is_last else run.start_generate(rollout_id + 1)
            run.train(rollout_id, rollout)
            if is_last or (rollout_id + 1) % config.update_weights_interval == 0:
                if upcoming is not None and not config.update_weights_in_flight:
                    run.wait_generated(rollout_id + 1, upcoming)
                run.update_weights()
            run.end_round(rollout_id, rollout)
            run.save(rollout_id)


if __name__ == "__main__":
    sys.exit(run_driver(train, sys.argv[1:]))
