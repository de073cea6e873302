"""An agent of mini-swe-agent, unmodified, that repairs or writes a file; it knows nothing of training.

The library brings the agent's loop, its templates and how an action is read. It takes a model and an environment, and
here these are the endpoint of slime, and the sandbox. Hidden tests give the reward.
"""

import asyncio
import atexit
import json
import marshal
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from openai import OpenAI
from pydantic import BaseModel

from slime.sandbox.shared import run_python, shared_sandbox

os.environ.setdefault("MSWEA_SILENT_STARTUP", "1")  # else the library greets each process

from minisweagent.agents.default import DefaultAgent
from minisweagent.exceptions import FormatError, LimitsExceeded, Submitted
from minisweagent.models.utils.actions_text import (
    format_observation_messages,
    parse_regex_actions,
)

if TYPE_CHECKING:
    from slime.agent import Session
    from slime.data.sample import Sample

_SOURCE = Path(__file__).with_name("shell.py")
# Compiled here, once: in the sandbox, whose interpreter is this one, that would take most of a command's time.
SHELL = "import marshal\nexec(marshal.loads({!r}))".format(
    marshal.dumps(compile(_SOURCE.read_text(encoding="utf-8"), _SOURCE.name, "exec"))
)
SUBMIT = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
EXIT_STATUS, NUM_STEPS = "exit_status", "steps"  # in the sample's metadata
MAX_FILES_CHARACTERS = 100_000
# The library waits in a thread for the model and for its commands; the loop's own few threads are for others.
_threads = ThreadPoolExecutor(1024, thread_name_prefix="coder")
_http = httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))
atexit.register(_http.close)


async def run_coder(session: "Session", sample: "Sample") -> float:
    """For --agent-function-path: the agent on one task, and 1.0 if the hidden tests pass.

    Args:
        session: its `args` have `coder_agent` and `coder_model` from --custom-config-path.
        sample: its metadata have `files` (name -> text), `module` (the file that is tested) and `tests`,
            Python with assert statements about the names of that file.
    """
    args, metadata = session.args, sample.metadata
    question: Any = (
        sample.prompt[-1]["content"] if isinstance(sample.prompt, list) else sample.prompt
    )
    loop = asyncio.get_running_loop()
    # The execution's own deadline leaves the thread where it is; it ends with what it waits for.
    timeout_s = args.generate_timeout_s or args.rollout_timeout_s
    model = EndpointModel(session, timeout_s, **args.coder_model)
    environment = SandboxEnvironment(args, metadata["files"], loop, timeout_s)
    agent = DefaultAgent(model, environment, **args.coder_agent)
    ended: dict[str, Any] = await loop.run_in_executor(_threads, agent.run, question)
    metadata[EXIT_STATUS], metadata[NUM_STEPS] = ended["exit_status"], agent.n_calls
    code = environment.files.get(metadata["module"])
    if ended["exit_status"] != "Submitted" or code is None:
        return 0.0
    limits = {"cpu_s": args.sandbox_cpu_s, "wall_s": args.sandbox_wall_s}
    return float((await shared_sandbox(args).test(code, metadata["tests"], **limits))[0])


class ModelConfig(BaseModel):
    """How an action is read and its output told; the names are those of the library's own models."""

    model_name: str
    action_regex: str = r"```mswea_bash_command\s*\n(.*?)\n```"
    observation_template: str
    format_error_template: str


class EndpointModel:
    """mini-swe-agent's protocol `Model`: chat completions of the session's endpoint."""

    def __init__(self, session: "Session", timeout_s: float, **settings: Any) -> None:
        self.config = ModelConfig(model_name=session.model, **settings)
        self._client = OpenAI(
            base_url=session.openai_base_url,
            api_key=session.api_key,
            http_client=_http,
            timeout=timeout_s,
        )

    def query(self, messages: list[dict[str, Any]], **kwargs: Any) -> dict[str, Any]:
        """The model's answer, with its one action.

        Raises:
            FormatError: it has none or several; the conversation goes on with it and with what is wrong.
            LimitsExceeded: there is no room for more.
        """
        plain: Any = [{"role": each["role"], "content": each["content"]} for each in messages]
        answer = self._client.chat.completions.create(model=self.config.model_name, messages=plain)
        choice = answer.choices[0]
        message = {"role": "assistant", "content": choice.message.content or ""}
        if choice.finish_reason == "length":
            raise LimitsExceeded(message, _exit("LimitsExceeded"))
        try:
            actions = parse_regex_actions(
                message["content"],
                action_regex=self.config.action_regex,
                format_error_template=self.config.format_error_template,
                template_kwargs={"finish_reason": choice.finish_reason},
            )
        except FormatError as error:
            # The answer stays in the conversation; without it a new branch would begin here.
            raise FormatError(message, *error.messages) from None
        return message | {"extra": {"actions": actions, "cost": 0.0}}

    def format_message(self, **kwargs: Any) -> dict[str, Any]:
        """A message."""
        return kwargs

    def format_observation_messages(
        self,
        message: dict[str, Any],
        outputs: list[dict[str, Any]],
        template_vars: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """What the model is told about its commands."""
        return format_observation_messages(
            outputs,
            observation_template=self.config.observation_template,
            template_vars=template_vars,
        )

    def get_template_vars(self, **kwargs: Any) -> dict[str, Any]:
        """For the agent's templates."""
        return self.config.model_dump()

    def serialize(self) -> dict[str, Any]:
        """For the library's record of a run."""
        return {"info": {"config": {"model": self.config.model_dump()}}}


class EnvironmentConfig(BaseModel):
    """Nothing: the sandbox's limits are those of the flags `--sandbox-*`."""


class SandboxEnvironment:
    """mini-swe-agent's protocol `Environment`: shell.py over files in memory, each command in the sandbox."""

    def __init__(
        self,
        args: Any,
        files: dict[str, str],
        loop: asyncio.AbstractEventLoop,
        timeout_s: float,
    ) -> None:
        self.config = EnvironmentConfig()
        self.files = dict(files)
        self._args, self._loop, self._timeout_s = args, loop, timeout_s

    def execute(self, action: dict[str, Any], cwd: str = "") -> dict[str, Any]:
        """What a command printed; in a thread, never in the loop.

        Raises:
            Submitted: the command was the library's sign for the end.
        """
        request = json.dumps({"files": self.files, "command": action["command"]})
        work = run_python(self._args, SHELL, stdin=request)
        result = asyncio.run_coroutine_threadsafe(work, self._loop).result(self._timeout_s)
        reply = _reply(result.stdout)
        if reply is None:  # it ran too long, took too much, or wrote past the shell
            told = f"the command was ended: {result.outcome}"
            return {"output": "", "returncode": -1, "exception_info": told}
        self.files = reply["files"]
        # Half a surrogate pair is no text: no request could hold it.
        output = reply["output"].encode("utf-8", "replace").decode()
        first, _, submission = output.lstrip().partition("\n")
        if first.strip() == SUBMIT and reply["returncode"] == 0:
            raise Submitted(_exit("Submitted", submission))
        return {
            "output": output,
            "returncode": reply["returncode"],
            "exception_info": "",
        }

    def get_template_vars(self, **kwargs: Any) -> dict[str, Any]:
        """For the agent's templates."""
        return {"files": sorted(self.files)}

    def serialize(self) -> dict[str, Any]:
        """For the library's record of a run."""
        return {"info": {"environment_files": self.files}}


def _exit(status: str, submission: str = "") -> dict[str, Any]:
    extra = {"exit_status": status, "submission": submission}
    return {"role": "exit", "content": submission, "extra": extra}


def _reply(text: str) -> dict[str, Any] | None:
    """What shell.py says; a program may have written to its output what it liked, so nothing is taken on trust."""
    try:
        reply = json.loads(text)
        files, output, code = reply["files"], reply["output"], reply["returncode"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(files, dict) or not isinstance(output, str) or not isinstance(code, int):
        return None
    size = 0
    for name, content in files.items():
        if not isinstance(content, str):
            return None
        size += len(name) + len(content)
    return reply if size <= MAX_FILES_CHARACTERS else None
