"""A little shell over files in memory; it runs inside the sandbox, where there are no files and no processes.

Standard input is JSON, `{"files": {name: text}, "command": text}`; standard output too, `{"files": ..., "output":
..., "returncode": ...}`. It knows `;`, `&&`, `||`, `|`, `>`, `>>`, `<`, here-documents, quotes, and the commands of
`COMMANDS`; it has one folder, no variables and no patterns for names. `python3` runs a program over the same files:
it opens and imports them.
"""

import builtins
import contextlib
import importlib.abc
import importlib.util
import io
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_TOKEN = re.compile(
    r"(?P<space>[ \t]+|\\\n|(?<![^\s;&|])#[^\n]*)"
    r"|(?P<operator>&&|\|\||2>&1|2>/dev/null|<<-?|>>|[;|<>\n])"
    r"""|(?P<word>(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\;&|<>])+)""",
    re.DOTALL,
)
_PIECE = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)|([^'"\\]+)""", re.DOTALL)
_SED = re.compile(r"(?:(\d+|\$)(?:,(\d+|\$))?)?\s*(?:s(?P<by>[^\w\s])(.*)|([pd]))", re.DOTALL)


class ShellError(Exception):
    """A command that fails: its text is told, and its code is 1, or 2 where the line cannot be read."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


@dataclass
class _Command:
    """Words, and where its input comes from and its output goes.

    Attributes:
        joint: what stands before it: "" at the start, else `;`, `&&`, `||` or `|`.
        into, appends: a file for the output, and whether it grows.
    """

    joint: str
    words: list[str] = field(default_factory=list[str])
    stdin: str | None = None
    reads: str | None = None
    into: str | None = None
    appends: bool = False
    drops_errors: bool = False


def main() -> None:
    """Run one command over the files, and say what came of it."""
    request = json.load(sys.stdin)
    shell = Shell(request["files"])
    output, code = shell.run(request["command"])
    json.dump({"files": shell.files, "output": output, "returncode": code}, sys.stdout)


class Shell:
    """Files by name, and commands over them."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = dict(files)

    def run(self, text: str) -> tuple[str, int]:
        """What the commands print, errors included, and the code of the last."""
        shown: list[str] = []
        code, piped, is_skipped = 0, "", False
        try:
            commands = _parse(text)
        except ShellError as error:
            return f"sh: {error}\n", error.code
        for command, following in zip(commands, [*commands[1:], None], strict=True):
            if command.joint == "&&" or command.joint == "||":
                is_skipped = (code == 0) == (command.joint == "||")
            elif command.joint != "|":
                is_skipped = False
            if is_skipped:
                continue
            try:
                output, errors, code = self._do(command, piped)
            except ShellError as error:
                output, errors, code = "", f"{command.words[0]}: {error}\n", error.code
            shown.append("" if command.drops_errors else errors)
            piped = ""
            if command.into is not None:
                before = self.files.get(command.into, "") if command.appends else ""
                self.files[command.into] = before + output
            elif following is not None and following.joint == "|":
                piped = output
            else:
                shown.append(output)
        return "".join(shown), code

    def _do(self, command: _Command, piped: str) -> tuple[str, str, int]:
        name, *arguments = command.words
        if name not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise ShellError(f"no such command here; there are {known}", 127)
        stdin = piped if command.stdin is None else command.stdin
        if command.reads is not None:
            stdin = self.text(command.reads)
        told = COMMANDS[name](self, arguments, stdin)
        return (told, "", 0) if isinstance(told, str) else told

    def text(self, name: str) -> str:
        """A file."""
        try:
            return self.files[_plain(name)]
        except KeyError:
            raise ShellError(f"{name}: No such file") from None


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _parse(text: str) -> list[_Command]:
    commands, waiting = [_Command("")], list[tuple[_Command, str, bool]]()
    at, redirect = 0, ""
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise ShellError(f"cannot read {text[at : at + 20]!r}", 2)
        at, command = token.end(), commands[-1]
        operator = token["operator"] or ""
        if token["space"]:
            continue
        if redirect:
            if operator:
                raise ShellError(f"nothing stands after {redirect}", 2)
            word = _word(token["word"])
            if redirect.startswith("<<"):
                waiting.append((command, word, redirect == "<<-"))
            elif redirect == "<":
                command.reads = word
            else:
                command.into, command.appends = _plain(word), redirect == ">>"
            redirect = ""
        elif token["word"]:
            command.words.append(_word(token["word"]))
        elif operator == "2>/dev/null":
            command.drops_errors = True
        elif operator in ("<", ">", ">>", "<<", "<<-"):
            redirect = operator
        elif operator != "2>&1":
            if operator == "\n":
                for owner, end, strips in waiting:
                    owner.stdin, at = _document(text, at, end, strips)
                waiting = []
            if command.words:
                commands.append(_Command(";" if operator == "\n" else operator))
            elif operator != "\n":
                raise ShellError(f"nothing stands before {operator}", 2)
    if redirect or waiting:
        raise ShellError("the line ends before its redirection", 2)
    if not commands[-1].words and commands[-1].joint not in ("&&", "||", "|"):
        commands.pop()
    if not all(command.words for command in commands):
        raise ShellError("a command is missing", 2)
    return commands


def _document(text: str, at: int, end: str, strips: bool) -> tuple[str, int]:
    lines: list[str] = []
    while at < len(text):
        line, _, _ = text[at:].partition("\n")
        at += len(line) + 1
        line = line.lstrip("\t") if strips else line
        if line == end:
            return "".join(f"{line}\n" for line in lines), at
        lines.append(line)
    raise ShellError(f"the here-document has no end {end}", 2)


def _word(text: str) -> str:
    found: list[str] = []
    for single, double, escaped, bare in (piece.groups() for piece in _PIECE.finditer(text)):
        expanded = bare or re.sub(r"\\.", "", double or "")
        if re.search(r"\$[\w({]|`", expanded):
            raise ShellError("there are no variables and no $(...) here", 2)
        found.append(
            single or escaped or bare or re.sub(r"\\([\\\"$`])", r"\1", double or "") or ""
        )
    return "".join(found)


# --- commands: from arguments and standard input to output, or (output, errors, code) ---


def _cat(shell: Shell, arguments: Sequence[str], stdin: str) -> str:
    numbers = "-n" in arguments
    text = _inputs(shell, [word for word in arguments if word != "-n"], stdin)
    if not numbers:
        return text
    return "".join(f"{n:6}\t{line}" for n, line in enumerate(text.splitlines(True), 1))


def _inputs(shell: Shell, names: Sequence[str], stdin: str) -> str:
    return "".join(shell.text(name) for name in names) if names else stdin


def _ls(shell: Shell, arguments: Sequence[str], stdin: str) -> str:
    names = [word for word in arguments if not word.startswith("-") and word not in (".", "./")]
    for name in names:
        shell.text(name)
    return "".join(f"{name}\n" for name in names or sorted(shell.files))


def _echo(shell: Shell, arguments: Sequence[str], stdin: str) -> str:
    return " ".join(arguments) + "\n"


def _head(shell: Shell, arguments: Sequence[str], stdin: str) -> str:
    count, names = _count(arguments)
    return "".join(_inputs(shell, names, stdin).splitlines(True)[:count])


def _tail(shell: Shell, arguments: Sequence[str], stdin: str) -> str:
    count, names = _count(arguments)
    lines = _inputs(shell, names, stdin).splitlines(True)
    return "".join(lines[max(len(lines) - count, 0) :])


def _count(arguments: Sequence[str]) -> tuple[int, list[str]]:
    found = re.match(r"-n ?(\d+) ?|-(\d+) ?", " ".join(arguments) + " ")
    if found is None:
        return 10, list(arguments)
    return int(found[1] or found[2]), " ".join(arguments)[found.end() :].split()


def _wc(shell: Shell, arguments: Sequence[str], stdin: str) -> str:
    text = _inputs(shell, [word for word in arguments if not word.startswith("-")], stdin)
    counts = {"-l": text.count("\n"), "-w": len(text.split()), "-c": len(text)}
    wanted = [counts[word] for word in arguments if word in counts]
    return " ".join(map(str, wanted or counts.values())) + "\n"


def _grep(shell: Shell, arguments: Sequence[str], stdin: str) -> tuple[str, str, int]:
    flags = "".join(word[1:] for word in arguments if word.startswith("-"))
    words = [word for word in arguments if not word.startswith("-") and word != "."]
    if not words:
        raise ShellError("it wants a pattern", 2)
    pattern = _compiled(words[0], "E" in flags, re.IGNORECASE if "i" in flags else 0)
    names = words[1:] or (sorted(shell.files) if "r" in flags else [])
    texts = [(name, shell.text(name)) for name in names] or [("", stdin)]
    found: list[str] = []
    for name, text in texts:
        for number, line in enumerate(text.splitlines(), 1):
            if bool(pattern.search(line)) != ("v" in flags):
                place = f"{name}:" if len(texts) > 1 else ""
                found.append(f"{place}{f'{number}:' if 'n' in flags else ''}{line}\n")
    return "".join(found), "", int(not found)


def _sed(shell: Shell, arguments: Sequence[str], stdin: str) -> str:
    flags = [word for word in arguments if word.startswith("-")]
    words = [word for word in arguments if not word.startswith("-")]
    if not words or not set(flags) <= {"-i", "-n", "-E", "-r", "-e"}:
        raise ShellError("here it takes -i, -n and -E, one expression, and files", 2)
    expression, *names = words
    extended, quiet = "-E" in flags or "-r" in flags, "-n" in flags
    if "-i" not in flags:
        return _edited(_inputs(shell, names, stdin), expression, extended, quiet)
    for name in names:
        shell.files[_plain(name)] = _edited(shell.text(name), expression, extended, quiet)
    return ""


def _edited(text: str, expression: str, extended: bool, quiet: bool) -> str:
    found = _SED.fullmatch(expression)
    if found is None:
        raise ShellError(f"cannot read {expression!r}; there are s/a/b/, p and d", 2)
    lines = text.splitlines(True)
    first, last = (
        len(lines) if place == "$" else int(place or 0) for place in (found[1], found[2])
    )
    last = last if found[2] else first
    substitute = _substitution(found["by"], found[4], extended) if found["by"] else None
    kept: list[str] = []
    for number, line in enumerate(lines, 1):
        is_chosen = not found[1] or first <= number <= last
        if is_chosen and substitute:
            line = substitute(line)
        if not quiet and not (is_chosen and found[5] == "d"):
            kept.append(line)
        if is_chosen and found[5] == "p":
            kept.append(line)
    return "".join(kept)


def _substitution(by: str, rest: str, extended: bool) -> Callable[[str], str]:
    parts = re.split(rf"(?<!\\){re.escape(by)}", rest)
    if len(parts) != 3 or set(parts[2]) - set("gI"):
        raise ShellError(f"cannot read s{by}{rest}", 2)
    old, new = (part.replace("\\" + by, by) for part in parts[:2])
    pattern = _compiled(old, extended, re.IGNORECASE if "I" in parts[2] else 0)

    def replacement(match: re.Match[str]) -> str:
        def expanded(piece: re.Match[str]) -> str:
            code = piece[1] or "&"
            if piece[0] == "&" or code.isdigit():
                return match[int(code) if code.isdigit() else 0] or ""
            return {"n": "\n", "t": "\t"}.get(code, code)

        return re.sub(r"\\(.)|&", expanded, new, flags=re.DOTALL)

    count = 0 if "g" in parts[2] else 1
    return lambda line: pattern.sub(replacement, line, count=count)


def _compiled(pattern: str, extended: bool, flags: int) -> re.Pattern[str]:
    if not extended:  # what is special with a backslash there is special without one here
        pattern = re.sub(r"\\?[+?(){}|]|\\.", _swapped, pattern)
        pattern = re.sub(r"^\*", r"\\*", pattern)
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ShellError(f"the pattern {pattern!r}: {error}", 2) from None


def _swapped(found: re.Match[str]) -> str:
    text = found[0]
    if text[-1] not in "+?(){}|":
        return text
    return text[1:] if text.startswith("\\") else "\\" + text


def _rm(shell: Shell, arguments: Sequence[str], stdin: str) -> str:
    for name in (word for word in arguments if not word.startswith("-")):
        shell.text(name)
        del shell.files[_plain(name)]
    return ""


def _cp(shell: Shell, arguments: Sequence[str], stdin: str) -> str:
    if len(arguments) != 2:
        raise ShellError("it takes a file and a new name", 2)
    shell.files[_plain(arguments[1])] = shell.text(arguments[0])
    return ""


def _mv(shell: Shell, arguments: Sequence[str], stdin: str) -> str:
    _cp(shell, arguments, stdin)
    if _plain(arguments[0]) != _plain(arguments[1]):
        del shell.files[_plain(arguments[0])]
    return ""


def _touch(shell: Shell, arguments: Sequence[str], stdin: str) -> str:
    for name in arguments:
        shell.files.setdefault(_plain(name), "")
    return ""


def _python(shell: Shell, arguments: Sequence[str], stdin: str) -> tuple[str, str, int]:
    words = list(arguments)
    if words[:1] == ["-c"] and len(words) > 1:
        name, code, given = "<string>", words[1], words[1:]
    elif words and words[0] != "-":
        name, code, given = _plain(words[0]), shell.text(words[0]), words
    else:
        name, code, given, stdin = "<stdin>", stdin, ["-"], ""
    out = io.StringIO()
    with _as_program(shell, out, stdin, ["-c" if name == "<string>" else name, *given[1:]]):
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__", "__file__": name})
        except SystemExit as leaving:
            if not isinstance(leaving.code, int | None):
                out.write(f"{leaving.code}\n")
            return (
                out.getvalue(),
                "",
                leaving.code if isinstance(leaving.code, int) else (leaving.code is not None),
            )
        except BaseException as error:  # noqa: BLE001 - this is where a program's errors end
            told = traceback.format_exception(type(error), error, _own_frames(error))
            return out.getvalue(), "".join(told), 1
    return out.getvalue(), "", 0


def _own_frames(error: BaseException) -> Any:
    return error.__traceback__.tb_next if error.__traceback__ else None


@contextlib.contextmanager
def _as_program(shell: Shell, out: io.StringIO, stdin: str, argv: list[str]) -> Iterator[None]:
    """What a program sees: its files behind `open` and `import`, its streams, its arguments."""
    imports, before, real = _Imports(shell.files), set(sys.modules), builtins.open
    own_in, own_argv = sys.stdin, sys.argv
    builtins.open = _opener(shell.files)
    sys.meta_path.insert(0, imports)
    sys.stdin, sys.argv = io.StringIO(stdin), argv
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            yield
    finally:
        builtins.open, sys.stdin, sys.argv = real, own_in, own_argv
        sys.meta_path.remove(imports)
        for name in imports.loaded - before:
            sys.modules.pop(name, None)


def _opener(files: dict[str, str]) -> Any:
    class Written(io.StringIO):
        def __init__(self, name: str, text: str) -> None:
            super().__init__(text)
            self.seek(0, io.SEEK_END)
            self._name = name

        def flush(self) -> None:
            files[self._name] = self.getvalue()

        def close(self) -> None:
            if not self.closed:
                self.flush()
            super().close()

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Of the files of the shell, as text."""
        name = _plain(str(file))
        if "b" in mode or "+" in mode:
            raise ValueError(f"files are opened to read, write or append text here, not {mode!r}")
        if "r" in mode:
            if name not in files:
                raise FileNotFoundError(2, "No such file", name)
            return io.StringIO(files[name])
        written = Written(name, files.get(name, "") if "a" in mode else "")
        written.flush()
        return written

    return opened


class _Imports(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules from the files."""

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files
        self.loaded: set[str] = set()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if f"{fullname}.py" not in self._files:
            return None
        self.loaded.add(fullname)
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module: Any) -> None:
        name = f"{module.__name__}.py"
        exec(compile(self._files[name], name, "exec"), vars(module))


COMMANDS: dict[str, Callable[[Shell, Sequence[str], str], str | tuple[str, str, int]]] = {
    "cat": _cat,
    "cp": _cp,
    "echo": _echo,
    "grep": _grep,
    "head": _head,
    "ls": _ls,
    "mv": _mv,
    "python": _python,
    "python3": _python,
    "rm": _rm,
    "sed": _sed,
    "tail": _tail,
    "touch": _touch,
    "true": lambda shell, arguments, stdin: "",
    "wc": _wc,
}

if __name__ == "__main__":
    main()
