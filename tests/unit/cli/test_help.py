from slime.cli.help import default_text, help_text, signature, state_text
from slime.config.fields import Option
from slime.config.index import command_line_index

TEXT = help_text()


def find(name: str) -> Option:
    option = command_line_index().find(name)
    assert option is not None
    return option


def test_help_names_every_flag_of_every_owner() -> None:
    lines = set(TEXT.splitlines())
    for option in command_line_index().options:
        assert f"  {signature(option)}" in lines


def test_help_is_grouped_by_owner() -> None:
    titles = [line for line in TEXT.splitlines() if line.endswith(":") and line[0] not in " u"]
    assert titles[0] == "Cluster and backend:"
    for title in ("Algorithm:", "Megatron: moe:", "SGLang server:", "Router: Routing Policy:"):
        assert title in titles


def test_signatures_show_how_a_flag_is_written() -> None:
    assert signature(find("--eps-clip")) == "--eps-clip FLOAT"
    assert signature(find("--colocate")) == "--colocate"
    assert signature(find("--offload-train")) == "--offload-train, --no-offload-train"
    assert signature(find("--rollout-stop")) == "--rollout-stop STR ..."
    assert signature(find("--kl-loss-type")) == "--kl-loss-type {k1,k2,k3,low_var_kl}"
    assert signature(find("--sglang-ep")).startswith("--sglang-ep-size, --sglang-expert-parallel")


def test_defaults_and_states_are_told() -> None:
    assert default_text(find("--eps-clip")) == "0.2"
    assert default_text(find("--profile-target")) == "train_overall"
    assert default_text(find("--colocate")) == ""
    assert state_text(find("--eps-clip")) == ""
    assert state_text(find("--release-train")).startswith("refused: not built yet")
    assert state_text(find("--ckpt-format")).startswith("only torch_dist; tools/convert_to_hf.py")
