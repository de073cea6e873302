import base64
import hashlib
import json
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from slime.cli.main import main
from slime.cli.report import write_report
from slime.errors import ConfigError
from slime.observability.report.curves import charts, series_of, thinned
from slime.observability.report.files import Notes
from slime.observability.report.phases import MAX_BARS, phases
from slime.observability.report.run import run_data
from slime.observability.report.samples import MAX_BYTES, sample_view, spread_out

EVIL = '</script><img src=x onerror="window.hit=1"><!--\u2028&lt;\''


def write_lines(path: Path, rows: Iterable[dict], tail: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a run of three rounds leaves it; the model wrote HTML."""
    folder = tmp_path / "runs" / "a"
    write_lines(
        folder / "metrics.jsonl",
        [
            {
                "time": 1000.0 + i,
                "rollout/step": i,
                "rollout/raw_reward": i / 2,
                "perf/step_time": 10.0,
                "perf/rollout_time": 6.0,
            }
            for i in range(3)
        ],
    )
    config = {"num_rollout": 5, "lr": 0.5, "wandb_key": "hidden-key", "megatron_argv": ["--x", "1"]}
    (folder / "config.json").write_text(json.dumps(config))
    sample = {
        "index": 0,
        "prompt": [{"role": "user", "content": EVIL}],
        "response": EVIL,
        "label": EVIL,
        "reward": {"why": EVIL},
        "response_length": 2,
        "pieces": ["a", EVIL],
        "rollout_log_probs": [-0.5, "NaN"],
        "loss_mask": [1, 0],
        "weight_versions": ["1"],
    }
    write_lines(folder / "samples" / "2.jsonl", [sample])
    span = {"role": "driver", "name": "rollout", "start": 1000.0, "end": 1006.0, "rollout_id": 0}
    write_lines(folder / "timeline" / "driver.jsonl", [span], tail='{"role": "dri')
    return folder


class Page(HTMLParser):
    """Elements of a page as a browser finds them, and the text of each script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, str] = {}
        self.policy = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self._inside = found.get("id") or tag
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def page_of(path: Path) -> tuple[Page, dict]:
    page = Page(path.read_text(encoding="utf-8"))
    return page, json.loads(page.texts["data"])


def test_text_of_the_model_cannot_become_markup(run: Path):
    page, data = page_of(write_report([run]))
    assert "img" not in page.tags
    assert page.tags.count("script") == 2
    assert "\u2028" not in page.texts["data"]
    (sample,) = data["runs"][0]["samples"][0]["samples"]
    assert sample["pieces"] == ["a", EVIL]  # all of it is still there, as text
    assert sample["label"] == EVIL


def test_the_page_allows_its_own_script_and_style_only(run: Path):
    page, _ = page_of(write_report([run]))
    assert page.policy.startswith("default-src 'none'")
    for name in ("script", "style"):
        digest = hashlib.sha256(page.texts[name].encode()).digest()
        assert f"{name}-src 'sha256-{base64.b64encode(digest).decode()}'" in page.policy


def test_the_script_writes_no_markup_and_loads_nothing():
    web = files("slime.observability.report").joinpath("web")
    scripts = [item for item in web.iterdir() if item.name.endswith((".js", ".html", ".css"))]
    assert len(scripts) == 7
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        found = re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|fetch\(|@import|url\(",
            text,
        )
        assert found is None, (script.name, found)
        links = set(re.findall(r"https?://[^\"' ]+", text))
        assert links <= {"http://www.w3.org/2000/svg"}, script.name


def test_a_secret_of_the_config_stays_out(run: Path):
    assert "hidden-key" not in write_report([run]).read_text()


def test_an_empty_folder_gives_a_page_that_says_what_is_missing(tmp_path: Path):
    (tmp_path / "samples").mkdir()
    _, data = page_of(write_report([tmp_path]))
    notes = " ".join(data["runs"][0]["notes"])
    for word in ("config.json", "metrics.jsonl", "timeline", "samples"):
        assert word in notes


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "samples/2.jsonl", "ledger.jsonl"]
)
@pytest.mark.parametrize(
    "damage", [b"\xff\x00{", b'[1]\n"x"\nnull\n', b'{"a": {"b": 1}}\n7\n', b""]
)
def test_no_damage_to_a_file_stops_the_report(run: Path, name: str, damage: bytes):
    (run / name).write_bytes(damage)
    page_of(write_report([run]))


@pytest.mark.parametrize(
    "row",
    [
        {"role": 1, "name": [], "start": "x", "end": 2},
        {"start": 2.0, "end": 1.0},
        {"name": "a", "start": "NaN", "end": 1},
        {"role": "driver", "name": "rollout", "start": 1, "end": 2, "rollout_id": "x"},
    ],
)
def test_odd_spans_do_not_stop_the_report(run: Path, row: dict):
    write_lines(run / "timeline" / "odd.jsonl", [row])
    page_of(write_report([run]))


def test_one_damaged_line_of_metrics_costs_itself_only(run: Path):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0] + "{dam\n" + "".join(lines[1:]))
    data = run_data(run, name="a")
    assert data["series"]["rollout/raw_reward"]["x"] == [0, 1, 2]
    assert "metrics.jsonl: 1 damaged lines are left out." in data["notes"]


def test_a_line_that_is_being_written_is_no_damage(run: Path):
    data = run_data(run, name="a")
    assert len(data["timeline"]["spans"]) == 1
    assert data["notes"] == []


def test_of_a_round_made_again_the_later_values_count():
    rows = [{"rollout/step": step, "x": value} for step, value in ((0, 1), (1, 2), (1, 3), (2, 4))]
    assert series_of(rows)["x"] == [(0, 1), (1, 3), (2, 4)]


def test_thinning_keeps_the_spikes():
    points = [(float(i), 0.0) for i in range(10_000)]
    points[4321] = (4321.0, 50.0)
    points[777] = (777.0, -50.0)
    few = thinned(points, 2000)
    assert len(few) <= 2000
    assert {(4321.0, 50.0), (777.0, -50.0)} <= set(few)
    assert few == sorted(few)
    assert thinned(points[:2000], 2000) == points[:2000]


def test_phases_of_each_side_add_up_and_have_their_share():
    rows = [
        {
            "rollout/step": i,
            "perf/round/generate_time": 6.0 + i,
            "perf/round/train_time": 3.0,
            "perf/round/idle_time": 1.0,
            "perf/trainer/train_time": 3.0,
            "perf/trainer/idle_time": 7.0 + i,
        }
        for i in range(2)
    ]
    rows[1]["perf/round/eval_time"] = 4.0  # only after the first round
    driver, trainer = phases(series_of(rows))
    assert (driver["side"], trainer["side"]) == ("round", "trainer")
    assert driver["total"] == [10.0, 15.0]
    parts = {part["name"]: part["seconds"] for part in driver["parts"]}
    assert parts == {
        "generate": [6.0, 7.0],
        "train": [3.0, 3.0],
        "eval": [0.0, 4.0],
        "idle": [1.0, 1.0],
    }
    shares = {part["name"]: (part["seconds"], part["share"]) for part in driver["shares"]}
    assert shares["generate"] == (13.0, 0.52)
    assert sum(share for _, share in shares.values()) == pytest.approx(1.0)


def test_phases_of_many_rounds_are_averaged():
    rows = [{"rollout/step": i, "perf/round/idle_time": float(i)} for i in range(2 * MAX_BARS)]
    (driver,) = phases(series_of(rows))
    assert driver["first"][:2] == [0, 2]
    assert driver["parts"][0]["seconds"][:2] == [0.5, 2.5]


def test_a_run_without_clocks_shows_what_its_metrics_tell():
    row = {
        "rollout/step": 0,
        "perf/step_time": 10.0,
        "perf/rollout_time": 5.0,
        "perf/train_time": 3.0,
        "perf/actor_train_time": 2.5,
        "perf/update_weights_time": 1.0,
    }
    evaluation = {"eval/step": 1, "perf/eval_time": 3.0}  # belongs to no round
    (found,) = phases(series_of([row, evaluation]))
    parts = {part["name"]: part["seconds"][0] for part in found["parts"]}
    assert parts == {
        "rollout": 5.0,
        "actor_train": 2.5,
        "train: rest": 0.5,
        "update_weights": 1.0,
        "other": 1.0,
    }
    assert (found["first"], found["total"]) == ([0], [10.0])


def test_charts_without_data_are_left_out():
    series = series_of(
        [{"rollout/step": 0, "rollout/raw_reward": 1.0}, {"eval/step": 0, "eval/d": 1}]
    )
    assert [chart["title"] for chart in charts(series)] == ["Reward", "Evaluation: d"]


def test_restarts_and_rounds_made_again_are_counted(run: Path):
    events = [
        {"event": "attempt", "number": 1, "first_rollout": 0},
        *(
            {"event": "rollout", "rollout_id": i, "samples": {"version": [i + 1, i]}}
            for i in range(3)
        ),
        {"event": "attempt", "number": 2, "first_rollout": 1},
        *({"event": "rollout", "rollout_id": i, "samples": {"version": [i]}} for i in range(1, 5)),
        {"event": "end"},
    ]
    write_lines(run / "ledger.jsonl", events)
    data = run_data(run, name="a")
    ledger = data["ledger"]
    assert (ledger["num_attempts"], ledger["rounds"], ledger["redone"]) == (2, 5, 2)
    assert ledger["ended"] is True
    assert data["series"]["staleness/mean"]["y"] == [0.5, 1, 1, 1, 1]


def test_samples_tell_the_staleness_of_a_run_without_a_ledger(run: Path):
    assert run_data(run, name="a")["series"]["staleness/max"]["y"] == [2]


def test_samples_of_an_older_slime_are_shown_as_text():
    view = sample_view({"index": 3, "response": "text", "reward": 1.0, "status": "completed"})
    assert (view["response"], view["reward"], "pieces" in view) == ("text", 1.0, False)


def test_columns_that_do_not_fit_the_tokens_are_left_out():
    view = sample_view({"pieces": ["a", "b"], "rollout_log_probs": [0.0], "loss_mask": [1, 0, 1]})
    assert view["mask"] == [1, 0]
    assert "log_probs" not in view


def test_a_long_run_stays_a_small_page(tmp_path: Path):
    token_rows = [
        {"pieces": ["word "] * 1000, "rollout_log_probs": [-0.25] * 1000, "response_length": 1000}
    ]
    for i in range(120):
        write_lines(tmp_path / "samples" / f"{i}.jsonl", token_rows * 3)
    rows = ({"rollout/step": i, "a": i * 1.1, "rollout/raw_reward": i} for i in range(4500))
    write_lines(tmp_path / "metrics.jsonl", rows)
    spans = ({"name": "x", "start": i, "end": i + 1, "rollout_id": i} for i in range(21_000))
    write_lines(tmp_path / "timeline" / "driver.jsonl", spans)
    path = write_report([tmp_path])
    assert path.stat().st_size < 5_000_000
    _, data = page_of(path)
    shown = data["runs"][0]
    assert len(shown["series"]["rollout/raw_reward"]["x"]) <= 2000
    assert [shown["samples"][0]["rollout_id"], shown["samples"][-1]["rollout_id"]] == [0, 119]
    assert len(json.dumps(shown["samples"])) <= MAX_BYTES * 1.1
    assert shown["timeline"]["spans"][-1][4] == 20_999
    assert any("--rounds" in note for note in shown["notes"])


def test_rounds_can_be_chosen(tmp_path: Path):
    for i in range(20):
        write_lines(tmp_path / "samples" / f"{i}.jsonl", [{"index": i, "response": "x"}])
    spans = ({"name": "x", "start": i, "end": i + 1, "rollout_id": i} for i in range(20))
    write_lines(tmp_path / "timeline" / "driver.jsonl", spans)
    data = run_data(tmp_path, name="a", rounds=(5, 7))
    assert [item["rollout_id"] for item in data["samples"]] == [5, 6, 7]
    assert [item[4] for item in data["timeline"]["spans"]] == [5, 6, 7]


def test_two_runs_are_told_apart_by_their_paths(run: Path):
    other = run.parent.parent / "other" / "a"
    write_lines(other / "metrics.jsonl", [{"rollout/step": 0, "rollout/raw_reward": 1.0}])
    path = write_report([run, other], run / "compare.html")
    _, data = page_of(path)
    assert [item["name"] for item in data["runs"]] == ["runs/a", "other/a"]


def test_flags_tell_value_and_default(run: Path):
    rows = {row["name"]: row for row in run_data(run, name="a")["flags"]}
    assert (rows["--lr"]["value"], rows["--lr"]["default"], rows["--lr"]["changed"]) == (
        "0.5",
        "1e-06",
        True,
    )
    assert rows["--x"]["value"] == "1"


def test_the_page_is_as_private_as_the_run(run: Path):
    assert write_report([run]).stat().st_mode & 0o077 == 0


def test_spreading_keeps_first_and_last():
    assert spread_out(range(100), 4) == [0, 33, 66, 99]
    assert spread_out([1, 2], 4) == [1, 2]


def test_the_command_names_the_page(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(run), "-o", str(run / "x.html")]) == 0
    assert capsys.readouterr().out == f"{run / 'x.html'}\n"


def test_a_folder_that_is_no_run_is_refused_with_what_it_holds(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["report", str(run.parent)]) == 2
    assert "is no run folder" in (error := capsys.readouterr().err)
    assert "it holds runs: a" in error
    assert main(["report", str(run), "--rounds", "9:3"]) == 2
    assert "FIRST:LAST" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_an_error_with_a_way_out(run: Path):
    with pytest.raises(ConfigError, match="choose a file with -o"):
        write_report([run], run / "no" / "x.html")


def test_a_note_is_told_once():
    notes = Notes()
    notes.add("a")
    notes.add("a")
    assert notes.lines == ["a"]


def test_a_sample_by_several_policies_shows_which_wrote_what() -> None:
    row = {"pieces": ["a", "b"], "version_spans": [[0, "3"], [1, "4"]]}
    assert sample_view(row)["spans"] == [[0, "3"], [1, "4"]]
    assert "spans" not in sample_view({"pieces": ["a"], "version_spans": [[0, "3"]]})
