"""Functions are judged from their source as `config/hooks.py` judges them imported."""

import sys
from pathlib import Path

import pytest

from slime.check.functions import check_functions
from slime.check.modules import Modules
from slime.config.config import Config
from slime.config.hooks import check_hooks
from slime.config.problems import Problems
from slime.errors import ConfigError

SOURCE = """
import functools
from package_of_a_user.inside import renamed as reward_from_elsewhere
from package_of_a_user import *

async def good(args, sample): ...
async def more(args, sample, extra=1, *rest, key="k", **others): ...
def plain(args, sample): ...
def too_few(args): ...
def too_many(args, sample, third): ...
async def keyword_only(args, *, sample): ...
async def needs_keyword(args, sample, *, key): ...
another_name = good
small = lambda args, sample: 1.0
not_a_function = 3
partly = functools.partial(too_many, third=1)

@functools.wraps(too_few)
def decorated(anything): ...

if True:
    async def inside_if(args, sample): ...
try:
    import no_such_package_at_all
except ImportError:
    no_such_package_at_all = None

class Callable:
    def __init__(self, args, sample): ...

class Base:
    def __init__(self, args): ...
    def get_samples(self, num_samples): ...
    def add_samples(self, samples): ...
    def save(self, rollout_id): ...

class Source(Base):
    def load(self, rollout_id=None): ...
    def __len__(self): return 0

class Lacking(Base):
    pass

class OtherArguments(Source):
    def __init__(self): ...
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "functions_of_a_user.py").write_text(SOURCE)
    package = tmp_path / "package_of_a_user"
    package.mkdir()
    (package / "__init__.py").write_text("from .inside import starred\n")
    inside = "async def renamed(args, sample): ...\nasync def starred(args, sample): ...\n"
    (package / "inside.py").write_text(inside)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judged(config: Config, folders: tuple[str, ...] = (".",)) -> list[str]:
    problems = Problems()
    check_functions(config, problems, Modules(folders))
    return problems.messages


def imported(config: Config) -> list[str]:
    try:
        check_hooks(config)
    except ConfigError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize(
    "name",
    [
        *("good", "more", "plain", "another_name", "small", "inside_if", "Callable"),
        *("reward_from_elsewhere", "starred", "partly"),
        *("too_few", "too_many", "keyword_only", "needs_keyword"),
    ],
)
def test_it_says_what_importing_says(folder: Path, name: str) -> None:
    config = Config(custom_rm_path=f"functions_of_a_user.{name}")
    from_source = judged(config)
    assert not {"functions_of_a_user", "package_of_a_user"} & set(sys.modules)
    assert from_source == imported(config)
    for module in ("functions_of_a_user", "package_of_a_user", "package_of_a_user.inside"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("name", ["Source", "Lacking", "OtherArguments"])
def test_classes_and_their_bases(folder: Path, name: str) -> None:
    found = judged(Config(data_source_path=f"functions_of_a_user.{name}"))
    expected = {
        "Source": [],
        "Lacking": ["must be a class DataSource(args) with load, __len__ too"],
        "OtherArguments": ["slime calls DataSource(args), found ()"],
    }[name]
    assert len(found) == len(expected)
    for message, part in zip(found, expected, strict=True):
        assert part in message


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("functions_of_a_user too_many", None),
        ("functions_of_a_user good", "slime calls fn(args, config, vp_stage), found"),
        ("functions_of_a_user get_specs", "--spec: cannot load 'functions_of_a_user.get_specs'"),
        ("functions_of_a_user", "must be a module and a function in it"),
        ("slime_plugins.models.glm4 get_glm_spec", None),
        ("slime_plugins.models.olmo2 get_olmo2_spec", None),
    ],
)
def test_the_function_of_spec_is_checked_too(folder: Path, words: str, part: str | None) -> None:
    found = judged(Config(megatron_argv=("--spec", *words.split())))
    assert len(found) == (part is not None)
    assert part is None or part in found[0]


def test_what_only_running_tells_is_a_note(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert judged(Config(custom_rm_path="functions_of_a_user.decorated")) == []
    assert "functions_of_a_user.decorated is there; only the run can check" in caplog.text


def test_a_missing_base_class_is_no_problem_of_the_source(folder: Path) -> None:
    (folder / "own_error.py").write_text("class E(dict):\n    def __init__(self, args): ...\n")
    assert judged(Config(custom_rm_path="own_error.E")) == []


def test_every_function_of_slimes_own_defaults_passes(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(
        eval_function_path="slime.rollout.sglang_rollout.generate_rollout",
        dynamic_sampling_filter_path=(
            "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
        ),
    )
    assert judged(config) == []
    assert caplog.text == ""


def test_modules_are_found_beside_the_script_first(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "beside_the_script"
    other.mkdir()
    (other / "functions_of_a_user.py").write_text("def only_here(args, sample): ...\n")
    config = Config(custom_rm_path="functions_of_a_user.only_here")
    assert judged(config, (str(other),)) == []
    assert len(judged(config)) == 1


def test_a_circle_of_names_ends(folder: Path) -> None:
    (folder / "circle_a.py").write_text("from circle_b import f\n")
    (folder / "circle_b.py").write_text("from circle_a import f\n")
    assert judged(Config(custom_rm_path="circle_a.f")) == []
