"""The reference pages, written by mkdocs from docstrings: one for each environment, tool, judge, wrapper, algorithm and policy.

What has a page is read from the registries, so that a new entry gets its own by itself. Every page has one form: what it is,
arguments, example, errors, source. Examples of docstrings carry their output (`tests/docs` runs them); those of environments
are episodes of the oracle, played while the pages are written. Notebooks become pages too, as they lie, without being run.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT, ROOT / "agents", ROOT / "algos", ROOT / "benchmarks"]

GROUPS = {
    "Environments": "A registered id is a task set with its tools and step limit. `gym.make(id, ...)` makes it.",
    "Tools": "What an action can call. `tools=[...]` of `gym.make` names them; live ones come in by `AddTool`.",
    "Judges": "Who scores each step. `judge=` of `gym.make`, `--judge` and `swirl judge` take the same names.",
    "Wrappers": "How live tools, judges and records come into an environment.",
    "Algorithms": "How a policy is improved. `swirl train RUN --algo NAME`; all stand on one trainer.",
    "Policies": "Who acts. `--model` of the command line takes the same names.",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One page of the reference."""

    group: str
    name: str
    """As users write it."""
    where: str
    """`module:attribute` of what the page is about."""

    @property
    def page(self) -> str:
        stem = re.sub(r"[^a-z0-9]+", "-", self.name.removeprefix("swirl/").removesuffix("-v0").lower()).strip("-")
        return f"reference/{self.group.lower()}/{stem}.md"


def entries() -> list[Entry]:
    """Everything that is registered, in the order of `GROUPS`."""
    import gymnasium as gym
    from swirl_agents.scripted import SCRIPTED
    from swirl_algos.launch import CONFIGS

    from swirl_env import wrappers
    from swirl_env.judges.named import BY_JSON, BY_NAME
    from swirl_env.registration import ENVS
    from swirl_env.tools.named import NAMES

    found = [Entry("Environments", name, f"swirl_env.tasks.{fixed['tasks']}:") for name, fixed in ENVS.items()]
    found += [Entry("Tools", name, where) for name, where in NAMES.items()]
    found += [Entry("Judges", name, where) for name, where in (BY_NAME | BY_JSON).items()]
    for name, value in vars(wrappers).items():
        if inspect.isclass(value) and issubclass(value, gym.Wrapper) and not name.startswith("_"):
            found.append(Entry("Wrappers", name, f"{wrappers.__name__}:{name}"))
    found += [Entry("Algorithms", name, f"swirl_algos.{name}:train") for name in CONFIGS]
    found += [Entry("Policies", name, f"{make.__module__}:{make.__name__}") for name, make in SCRIPTED.items()]
    found += [
        Entry("Policies", "endpoint:URL", "swirl_agents.endpoint:EndpointPolicy"),
        Entry("Policies", "a model's name or folder", "swirl_agents.local:LocalPolicy"),
        Entry("Policies", "a person", "swirl_agents.human:play"),
    ]
    return list({(one.group, one.where): one for one in reversed(found)}.values())[::-1]  # one page for `mcp:...`


# -- what a docstring says


@cache
def read(where: str) -> griffe.Object:
    """The parsed source behind `module:attribute` or `module:`; nothing is imported."""
    module, _, attribute = where.partition(":")
    path = f"{module}.{attribute}".strip(".")
    found = _package(module.partition(".")[0])[path.partition(".")[2]]
    return found.final_target if isinstance(found, griffe.Alias) else found


@cache
def _package(name: str) -> Any:
    return griffe.load(name, search_paths=SOURCES, docstring_parser="google", allow_inspection=False)


@dataclasses.dataclass
class Said:
    """A docstring in parts."""

    text: str = ""
    arguments: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    """(name, default, meaning)"""
    errors: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    example: str = ""
    logs: str = ""


def said(where: str) -> Said:
    """What an object's docstring says, with the defaults of its signature."""
    thing, parts = read(where), Said()
    if thing.docstring is None:
        return parts
    texts = []
    called: Any = thing.members.get("__init__", thing) if thing.is_class else thing
    defaults = {one.name: one.default for one in called.parameters} if hasattr(called, "parameters") else {}
    for section in thing.docstring.parse("google", warnings=False):
        if section.kind is griffe.DocstringSectionKind.text:
            texts.append(section.value)
        elif section.kind is griffe.DocstringSectionKind.parameters:
            for one in section.value:
                default = defaults.get(one.name)
                parts.arguments.append((one.name, "" if default is None else str(default), one.description))
        elif section.kind is griffe.DocstringSectionKind.raises:
            parts.errors += [(str(one.annotation), one.description) for one in section.value]
        elif section.kind is griffe.DocstringSectionKind.examples:
            parts.example = "\n".join(text for _, text in section.value)
    parts.text = "\n\n".join(texts)
    return parts


def prose(text: str) -> str:
    """Text of a docstring as Markdown: paragraphs of `name   meaning` in columns become tables, and signs stay signs."""
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", text.strip("\n")))


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if all(line.startswith("    ") for line in lines):
        return "```text\n" + inspect.cleandoc(text) + "\n```"
    rows: list[list[str]] = []
    for line in lines:
        if found := re.fullmatch(r"(\S.*?)\s{3,}(\S.*)", line):
            rows.append([found[1], found[2]])
        elif rows and line.startswith("    "):
            rows[-1][1] += " " + line.strip()
        else:
            return _plain(text)
    return table(("", ""), rows)


def _plain(text: str) -> str:
    """HTML-like and Markdown-like signs outside of backticks as themselves."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else re.sub(r"([<*_\[\]|])", r"\\\1", part) for i, part in enumerate(parts))


def table(head: tuple[str, ...], rows: Any) -> str:
    """A Markdown table."""
    shown = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *shown]]
    return "\n".join(lines)


def _arguments(rows: list[tuple[str, str, str]]) -> str:
    shown = [(f"`{name}`", f"`{default}`" if default else "", _plain(text)) for name, default, text in rows]
    return table(("argument", "default", "meaning"), shown)


# -- the fixed form


def write(entry: Entry) -> str:
    """The page of an entry."""
    module = entry.where.partition(":")[0] + ":"
    own, about = said(entry.where), said(module)
    facts, arguments, example = "", _arguments(own.arguments) if own.arguments else "", ""
    if own.example:
        example = f"```pycon\n{own.example}\n```"
    if entry.group == "Environments":
        facts, arguments, example, own = _environment(entry)
    elif entry.group == "Algorithms":
        arguments, example = _algorithm(entry, own)
    what = {
        "Wrappers": [own.text],
        "Environments": [about.text],
        "Algorithms": [about.text, own.text],
    }.get(entry.group, [own.text, about.text])
    errors = [(f"`{name}`", _plain(text)) for name, text in own.errors]
    source = read(entry.where)
    code = source.source if source.is_function or source.is_class else ""
    relative = Path(str(source.filepath)).relative_to(ROOT)
    lines = f", lines {source.lineno} to {source.endlineno}" if code else ""
    parts = {
        "What it is": "\n\n".join([*(prose(text) for text in what if text), *([facts] if facts else [])]),
        "Arguments": arguments or "None.",
        "Example": example,
        "Errors": table(("error", "when"), errors) if errors else "None of its own.",
        "Source": f"`{relative}`{lines}" + (f"\n\n??? note \"Code\"\n\n    ```python\n{_indent(code)}\n    ```" if code else ""),
    }  # fmt: skip
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())
    return f"# `{entry.name}`\n\n{body}\n"


def _indent(code: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in inspect.cleandoc("\n" + code).split("\n"))


def _environment(entry: Entry) -> tuple[str, str, str, Said]:
    """(facts, arguments, example, docstring of the task set with the errors of all environments)."""
    import gymnasium as gym

    from swirl_env.registration import ENVS
    from swirl_env.tasks import load_tasks

    module = importlib.import_module(entry.where.rstrip(":"))
    maker = "generate" if hasattr(module, "generate") else "read"
    fixed, shared, own = ENVS[entry.name], said("swirl_env.env:ToolEnv"), said(entry.where + maker)
    splits = getattr(module, "FILES", None) or module.SPLITS
    counts = ", ".join(f"{len(load_tasks(fixed['tasks'], split).tasks):,} {split}" for split in splits)
    tools = ", ".join(f"[`{name}`](../tools/{name}.md)" for name in fixed["tools"])
    metrics = ", ".join(f"`{name}`" for name in module.METRICS)
    facts = table(
        ("", ""),
        [("tasks that come with it", counts), ("tools", tools), ("steps", fixed["max_steps"]), ("metrics", f"{metrics} (the first is the outcome)")],
    )  # fmt: skip
    special = [row for row in own.arguments if row[0] not in ("split", "rows", "file")]
    common = [row for row in shared.arguments if row[0] not in ("tasks", "options")]
    common = [(name, str(fixed.get(name, default)), text) for name, default, text in common]
    code = EPISODE.format(id=entry.name)
    world: dict[str, Any] = {"gym": gym}
    printed: list[str] = []
    exec(code, world | {"print": lambda *values: printed.append(" ".join(map(str, values)))})
    text = said(entry.where)
    text.errors = own.errors + shared.errors
    example = f"```python\n{code}```\n\nprints\n\n```text\n" + "\n".join(printed) + "\n```"
    return facts, _arguments(special + common), example, text


EPISODE = """import gymnasium as gym, swirl_env
from swirl_agents.rollout import rollout
from swirl_agents.scripted import oracle

env = gym.make("{id}")
text, info = env.reset(seed=0)
print(text)
trajectory = next(rollout(lambda: env, oracle(env.unwrapped), [(info["task_id"], 0)]))  # the gold demonstration
for step in trajectory.steps:
    print(step.action.text)
    print(step.observation)
    print(f"   [{{step.verdict.score:.2f}}: {{step.verdict.reason}}]")
print(trajectory.stop, trajectory.outcome)
"""
ONLINE = "swirl generate swirl/Arithmetic-v0 --model oracle --tasks 16 --samples 1 --out runs/sums\n"


def _algorithm(entry: Entry, own: Said) -> tuple[str, str]:
    """(arguments of the command line and of Python, example)."""
    from swirl_algos.launch import CONFIGS

    flags = settings(f"swirl_algos.configs:{CONFIGS[entry.name].__name__}")
    arguments = (
        f"Of `swirl train RUN --algo {entry.name}`, beside those of [every training](index.md):\n\n{_arguments(flags)}\n\n"
        f"Of `swirl_algos.{entry.name}.train`:\n\n{_arguments(own.arguments)}"
    )
    few = " --updates 10" if any(name == "--updates" for name, *_ in flags) else ""
    skip = "<!-- not run: one update of a weak policy has no outcome to learn from; `swirl bench learn` is tested with it -->\n"
    example = (skip if entry.name == "grpo" else "") + (
        f"```sh\n{ONLINE}swirl judge runs/sums --judge rules\nswirl filter runs/sums --by process\n"
        f"swirl train runs/sums --algo {entry.name} --model smollm2-135m{few}\n```\n\n"
        f"writes a model folder `runs/sums/{entry.name}`, and how it came about into `runs/sums/training/{entry.name}`."
    )
    return arguments, example


def settings(where: str) -> list[tuple[str, str, str]]:
    """(flag, default, meaning) of a config's fields, those of its parents included."""
    module, _, name = where.partition(":")
    kind = getattr(importlib.import_module(module), name)
    meanings: dict[str, str] = {}
    for parent in reversed(kind.__mro__[:-1]):
        for key, one in read(f"{module}:{parent.__name__}").members.items():
            if one.docstring is not None:
                meanings[key] = " ".join(one.docstring.value.split())
    return [
        (f"--{field.name.replace('_', '-')}", str(field.default), meanings.get(field.name, ""))
        for field in dataclasses.fields(kind)
    ]


def overview(group: str) -> str:
    """The first page of a group: what is there, in a line each."""
    rows = []
    for entry in (one for one in entries() if one.group == group):
        text = said(entry.where).text if entry.group != "Algorithms" else said(entry.where.partition(":")[0] + ":").text
        first = text.partition("\n\n")[0].replace("\n", " ")
        first = re.split(r"(?<=[a-z0-9)`])[.:]\s", first)[0].rstrip(".:")
        rows.append((f"[`{entry.name}`]({entry.page.rpartition('/')[2]})", _plain(first)))
    text = f"# {group}\n\n{GROUPS[group]}\n\n{table(('name', 'what it is'), rows)}\n"
    if group == "Wrappers":
        text += "\n" + prose(said("swirl_env.wrappers:").text) + "\n"
    if group == "Algorithms":
        launch = [(name, default, meaning) for name, default, meaning in settings("swirl_algos.launch:Launch")]
        launch = [row for row in launch if row[0] not in ("--run", "--trainer")]
        trainer = [(f"--trainer.{name[2:]}", *rest) for name, *rest in settings("swirl_algos.configs:TrainerConfig")]
        text += f"\n## Settings of every training\n\n{_arguments(launch + trainer)}\n"
    return text


def commands() -> str:
    """The page of the command line: each command with its example."""
    from swirl_benchmarks.cli import COMMANDS, GROUPS

    flat = {f"swirl {name}": command for name, command in COMMANDS.items() if name not in GROUPS}
    for group, inner in GROUPS.items():
        flat |= {f"swirl {group} {name}": command for name, command in inner.items()}
    rows = []
    for name, command in flat.items():
        text = inspect.getdoc(command) or ""
        example = re.search(r"^Example: (.*)$", text, re.M)
        rows.append((f"`{name}`", _plain(text.partition("\n")[0]), f"`{example[1]}`" if example else ""))
    return (
        "# The command line\n\n`swirl COMMAND --help` lists the settings of each. What was written is kept: the long ones go on "
        "where they stopped when the same command is given again.\n\n"
        + table(("command", "what it does", "example"), rows)
        + "\n"
    )


def pages() -> Iterator[tuple[str, str]]:
    """(path, Markdown) of every page that is written here."""
    yield "reference/commands.md", commands()
    for group in GROUPS:
        yield f"reference/{group.lower()}/index.md", overview(group)
    for entry in entries():
        yield entry.page, write(entry)
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        yield f"notebooks/{notebook.stem}.md", _notebook(notebook)


def _notebook(path: Path) -> str:
    from nbconvert import MarkdownExporter

    text, _ = MarkdownExporter().from_filename(str(path))
    return f"{text.rstrip()}\n\n[Download this notebook]({path.name})\n"


# -- what mkdocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The reference's part of the navigation."""
    assert config.nav is not None
    place = next(section for section in config.nav if "Reference" in section)["Reference"]
    found = entries()
    place[:0] = [
        {group: [f"reference/{group.lower()}/index.md", *({one.name: one.page} for one in found if one.group == group)]}
        for group in GROUPS
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for path, text in pages():
        files.append(File.generated(config, path, content=text))
    return files
