"""The command line of a job: a typed config from flags and a YAML file, and errors that a user can act on."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import pydantic
import tyro
import yaml

from cluster.scheduler import Interrupted, StageError
from cluster.shard import ShardError
from cluster.stage import StageOptions
from cluster.store import StoreError, read_url

SECRETS = ("seed", "secret_seed", "rekey")
"""Fields whose value may be a secret, given in place of its reference."""
ConfigT = TypeVar("ConfigT", bound="Config")
USER_ERRORS = (StageError, StoreError, ShardError, ValueError, FileNotFoundError, ConnectionError)

SETTLED = re.compile(r"facemae (?P<job>[a-z_]+): settled with exit code (?P<code>[0-9]+)\b")
"""The line by which a job that somebody would try again (``FACEMAE_RETRIED=1``) says its exit code, as it then ends with 0."""


class UsageError(ValueError):
    """A configuration that cannot be; the message names the field, the reason and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every job's configuration: a frozen dataclass whose field docstrings are the help text."""

    def check(self) -> None:
        """Raise ValueError for values that cannot be, whatever the data: asked before a pipeline or a submission begins."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")

    takes_file: ClassVar[bool] = True
    """Whether --config FILE.yaml fills the fields; a job that has too few, or that hands a file on to another one, takes none."""


@dataclass(frozen=True, kw_only=True)
class RayConfig(Config):
    """Where and on how many workers a job runs; nothing here changes a byte of its output."""

    address: str | None = None
    """Address of a running Ray cluster; without one (and without RAY_ADDRESS) a local Ray is started on loopback."""
    num_workers: int = 0
    """Workers; 0 takes as many as fit the cluster."""
    cpus_per_worker: int = 1
    """CPU cores of one worker."""
    gpus_per_worker: float = 0.0
    """GPUs of one worker; fractions share a GPU."""
    max_failures: int = 3
    """Failures after which a shard is given up and quarantined whole. Give more where workers are killed often, as on spot machines."""

    def __post_init__(self) -> None:
        # tyro's place holder for a value still to come is no number
        counts = {name: getattr(self, name) for name in ("num_workers", "cpus_per_worker", "gpus_per_worker")}
        for name, value in counts.items():
            if isinstance(value, int | float) and value < 0:
                raise UsageError(f"--{name.replace('_', '-')} {value}: give 0 or more")
        if isinstance(self.max_failures, int) and self.max_failures < 1:
            raise UsageError(f"--max-failures {self.max_failures}: give 1 or more")

    def stage_options(self) -> StageOptions:
        """The same as options of a stage."""
        return StageOptions(
            num_workers=self.num_workers,
            cpus_per_worker=self.cpus_per_worker,
            gpus_per_worker=self.gpus_per_worker,
            max_failures=self.max_failures,
        )


def parse(kind: type[ConfigT], arguments: Sequence[str], program: str) -> ConfigT:
    """The configuration from ``--config FILE.yaml`` (local or s3://), overridden by flags.

    Raises:
        UsageError: the file is no YAML mapping of this job's fields.
        SystemExit: wrong flags, or ``--help``; the explanation was printed.
    """
    if not kind.takes_file:
        _take_config(arguments)  # a field of its own, and given once like any file
        return tyro.cli(kind, prog=program, args=list(arguments), description=inspect.cleandoc(kind.__doc__ or ""))
    rest, file = _take_config(arguments)
    epilog = "--config FILE.yaml gives the same fields as a file (names with _ for -); flags override it."
    description = f"{inspect.cleandoc(kind.__doc__ or '')}\n\n{epilog}"
    if file is None:
        return tyro.cli(kind, prog=program, args=rest, description=description)
    return tyro.cli(kind, prog=program, args=rest, description=description, default=from_mapping(kind, load_mapping(file), where=file))


def from_mapping(kind: type[ConfigT], content: Mapping[str, Any], *, where: str, complete: bool = False) -> ConfigT:
    """A configuration from plain values, type-checked.

    Args:
        complete: raise when a required field is absent, rather than leave it to the flags.

    Raises:
        UsageError: an unknown field or a value of the wrong type, by name.
    """
    hints, fields = get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(content) - set(fields))
    if unknown:
        raise UsageError(f"{where}: unknown field {unknown[0]!r}; the fields are {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name in content:
            values[name] = _typed(hints[name], content[name], f"{where}: {name}")
        elif required and complete:
            raise UsageError(f"{where}: the field {name!r} is missing")
        elif required:
            values[name] = tyro.MISSING
    config = kind(**values)
    if complete:
        try:
            config.check()
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None
    return config


def main_of(kind: type[ConfigT], run: Callable[[ConfigT], Any], arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what went wrong into one clear line. Returns the exit code: 0 done, 2 an error, 3 done with shards
    or cells given up or without a single image, 4 done, and the release withheld by the gate (``withheld`` in what ``run`` returned), 130
    stopped at once, 143 stopped as asked; or what ``run`` returned as ``exit_code``. What to run next (``next`` in the same) is
    printed here, so that a job inside of another one does not say it. FACEMAE_TRACEBACK=1 shows where an error came from."""
    name = (run.__module__ if run.__module__ != "__main__" else os.path.basename(sys.argv[0]).removesuffix(".py")).rpartition(".")[2]
    try:
        config = parse(kind, sys.argv[1:] if arguments is None else arguments, f"facemae {name}")
        result = run(config)
    except Interrupted as error:
        print(f"\nfacemae {name}: {error}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"\nfacemae {name}: stopped at once; what was committed stays, run the same command to go on", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if os.environ.get("FACEMAE_TRACEBACK"):
            traceback.print_exc()
        print(f"\nfacemae {name}: error: {_ended_once(str(error))}", file=sys.stderr)
        return 2
    result = result if isinstance(result, Mapping) else {}
    if result.get("next"):
        print(f"next:    {result['next']}", flush=True)
    if result.get("withheld"):
        print(f"\nfacemae {name}: release withheld: {result['withheld']}", file=sys.stderr)
        return settled(name, 4)
    given_up = result.get("failed_shards") or result.get("failed_cells") or result.get("samples") == 0
    return settled(name, 3) if given_up else int(result.get("exit_code", 0))


def settled(name: str, code: int) -> int:
    """The exit code of a job whose result stands, and which no other try would change. Where somebody tries a job again that did not end
    with 0 (FACEMAE_RETRIED=1: Kubernetes) it is 0, and the code stands in the log, in a line that ``SETTLED`` finds."""
    if os.environ.get("FACEMAE_RETRIED") != "1":
        return code
    sys.stderr.flush()
    print(f"facemae {name}: settled with exit code {code}", flush=True)
    return 0


def load_mapping(file: str) -> Mapping[str, Any]:
    """The content of a YAML file (local or s3://) of a job's fields.

    Raises:
        UsageError: a folder, no YAML, an empty file, no mapping, or a key twice.
    """
    if Path(file).is_dir():
        raise UsageError(f"--config {file} is a folder: give the YAML file in it")
    try:
        content = yaml.load(read_url(file), Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is no YAML: {_where(error)}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is no YAML: it is no text") from None
    if content is None:
        raise UsageError(f"{file} is empty: write the job's fields into it, as NAME: VALUE")
    if not isinstance(content, Mapping):
        raise UsageError(f"{file} must be a mapping of the job's fields")
    return content


class _Loader(yaml.SafeLoader):
    """Plain YAML that refuses a key given twice: the second one would silently win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """See yaml.SafeLoader. Raises ConstructorError for a key that is there twice."""
        seen = set[Hashable]()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice: remove one", key_node.start_mark)
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


def _where(error: yaml.YAMLError) -> str:
    """A YAML error as one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark and problem else " ".join(str(error).split())


def _ended_once(message: str) -> str:
    """A message without a second full stop at its end, which a foreign error inside of it may have left."""
    return message if message.endswith("...") else re.sub(r"\.\.$", ".", message)


def _take_config(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without ``--config FILE``, and FILE."""
    rest, files, pending = list[str](), list[str](), False
    for argument in arguments:
        if pending:
            files, pending = [*files, argument], False
        elif argument == "--config":
            pending = True
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    if pending or "" in files:
        raise UsageError("--config needs a file")
    if len(files) > 1:
        raise UsageError(f"--config is given {len(files)} times ({', '.join(files)}): put all fields into one file")
    return rest, files[0] if files else None


def _typed(hint: Any, value: Any, where: str) -> Any:
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *map(str, first["loc"])])
        given = "what was given is not repeated here" if where.rpartition(" ")[2] in SECRETS else f"given: {first['input']!r}"
        raise UsageError(f"{place}: {first['msg']} ({given})") from None
